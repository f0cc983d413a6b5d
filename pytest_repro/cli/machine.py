"""`pytest-repro env`."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from .. import review
from ..text import inert
from .shell import AsJson, app, as_data, console, reported


@app.command()
@reported
def env(as_json: AsJson = False) -> None:
    """This machine's fingerprint, as far as it is known without a model."""
    facts = review.environment()
    if as_json:
        as_data(facts)
        return
    table = Table("field", "class", "value", box=None)
    for name, cls, value in review.classified(facts):
        table.add_row(Text(name), cls, Text(inert(str(value))))
    console.print(table)
