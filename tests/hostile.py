"""What a model, a golden, a suite or a report may say to act where it is shown: name -> text, as Python and JSON carry it."""

from __future__ import annotations

import re
from collections.abc import Iterator

ESCAPE, BELL, CSI = "\x1b", "\x07", "\x9b"
FENCES = {
    f"fence-{n}": f"\n{'`' * n}\n# escaped from {n}\n<b>x</b>\n{'`' * n}diff\n" for n in (1, 2, 3, 4, 5, 8, 40, 400)
}

TEXTS: dict[str, str] = {
    # --- a CI runner's commands
    "set-output": "::set-output name=verdict::pass",
    "set-env": "\n::set-env name=PATH::/tmp/evil",
    "stop-commands": "\n::stop-commands::pwned\n",
    "resume-commands": "\n::pwned::\n",
    "add-mask": "\r\n::add-mask::e\r\n",
    "error-command": "  \t ::error file=a.py,line=1::forged",
    "group": "::group::x\n::endgroup::\n::debug::y",
    "save-state": "\n::save-state name=a::b",
    "bracket-command": "##[error]forged",
    "bracket-mid-line": "text ##[add-mask]e ##[section]y",
    "azure": "\n##vso[task.setvariable variable=a]b",
    "percent-escapes": "%0A::error::forged%0D%25%3A%2C",
    "double-percent": "%250A::error::forged",
    "title-breakout": "a,file=/etc/passwd,line=1,title=forged::forged",
    "output-line": "\nverdict=pass\nerror=0\n",
    "heredoc": "\nverdict<<EOF\npass\nEOF\n",
    "heredoc-ours": "\nend-00000000000000000000000000000000\nverdict<<end-0\npass\nend-0\n",
    "env-file": "BASH_ENV<<x\n/tmp/evil\nx\nLD_PRELOAD=/tmp/evil.so\n",
    "teamcity": "\n##teamcity[testFailed name='x']",
    # --- a terminal
    "colour": f"{ESCAPE}[31mred{ESCAPE}[0m",
    "clear": f"{ESCAPE}[2J{ESCAPE}[H",
    "title": f"{ESCAPE}]0;owned{BELL}",
    "hyperlink": f"{ESCAPE}]8;;https://evil.example{ESCAPE}\\click{ESCAPE}]8;;{ESCAPE}\\",
    "clipboard": f"{ESCAPE}]52;c;ZXZpbA=={BELL}",
    "device-query": f"{ESCAPE}P+q544e{ESCAPE}\\{ESCAPE}[6n",
    "c1": f"{CSI}2J\x85\x8d\x90",
    "carriage-return": "drift\rPASS ",
    "backspace": "FAIL\b\b\b\bPASS",
    "nul": "a\x00b\x00",
    "shift-out": "\x0e\x0f\x0b\x0c\x7f",
    # --- Unicode
    "right-to-left": "\u202egpj.exe\u202c",
    "isolate": "\u2066\u2067\u2068x\u2069",
    "zero-width": "a\u200bb\u200cc\u200dd\ufeffe\u2060f",
    "line-separators": "a\u2028::error::b\u2029c\x85d",
    "tags": "\U000e0001\U000e0061\U000e007f",
    "lone-surrogate": "a\ud800b\udfff",
    "surrogates-swapped": "\udc00\ud83d",
    "noncharacters": "\ufffe\uffff\U0010ffff\ufdd0",
    "private-use": "\ue000\U000f0000",
    "combining": "e" + "\u0301" * 300,
    # --- HTML
    "script": "<script>alert(1)</script>",
    "script-end": "</script><script>alert(1)</script>",
    "style-end": "</style><style>*{display:none}</style>",
    "comment-open": "<!-- ",
    "comment-close": " --> <h1>x</h1>",
    "marker": "<!-- pytest-repro: check -->",
    "image-onerror": '"><img src=x onerror=alert(1)>',
    "attribute": "' onmouseover='alert(1)' x='",
    "svg": "<svg/onload=alert(1)><animate>",
    "iframe": '<iframe src="javascript:alert(1)"></iframe>',
    "base": '<base href="https://evil.example/"><meta http-equiv=refresh content=0>',
    "entities": "&lt;script&gt;&#60;b&#62;&colon;&NewLine;",
    "cdata": "]]><!ENTITY x SYSTEM 'file:///etc/passwd'>&x;<?php ?>",
    "details": "</details></summary></td></table></pre></code>",
    "template": "{{ 7 * 7 }}{% raw %}${{ github.token }} ${7*7} `id` $(id)",
    # --- Markdown
    "link": "[click](https://evil.example) [r][1]\n\n[1]: https://evil.example\n",
    "image": "![](https://evil.example/pixel.png)",
    "image-reference": "![x][p]\n\n[p]: https://evil.example/pixel.png",
    "autolink": "https://evil.example www.evil.example <https://evil.example> evil@example.org",
    "javascript-link": "[x](javascript:alert(1)) [y](data:text/html,x)",
    "heading": "\n# PASS\n\nPASS\n====\n",
    "table": "\n| a | b |\n| --- | --- |\n| c | d |\n",
    "cells": "a | b \\| c \\\\| d ||",
    "backslashes": "\\\\\\`\\|\\",
    "rule": "\n---\n***\n",
    "list": "\n- [x] done\n1. x\n> quote\n",
    "emphasis": "**bold** _em_ ~~gone~~ ==x==",
    "backticks": "` `` ``` x ` y",
    "backtick-edges": "`x`",
    "indented": "\n\n    code\n\n\tcode\n",
    "mention": "@octocat @org/team @everyone",
    "references": "#123 GH-1 octo/repo#1 fixes #1 deadbeefdeadbeefdeadbeefdeadbeefdeadbeef",
    "maths": "$`x`$ $$\\href{javascript:alert(1)}{x}$$",
    "mermaid": "\n```mermaid\ngraph TD; A-->B; click A href \"https://evil.example\"\n```\n",
    "footnote": "x[^1]\n\n[^1]: evil",
    "emoji": ":white_check_mark: :tada:",
    "alert": "\n> [!CAUTION]\n> PASS\n",
    "front-matter": "---\ntitle: PASS\n---\n",
    **FENCES,
    "tildes": "\n~~~\nx\n~~~\n",
    # --- files, shells, other formats
    "path": "../../../../etc/passwd",
    "absolute-path": "/etc/passwd",
    "device": "/dev/stdin",
    "option": "--output=/tmp/evil",
    "shell": "'; rm -rf / #\n$(touch /tmp/evil)`touch /tmp/evil`",
    "rich-markup": "[bold red]x[/bold red] [link=https://evil.example]y[/link] [/]",
    "format": "%s%n{0}{__class__}\\N{BULLET}\\x1b",
    "spreadsheet": "=HYPERLINK(\"https://evil.example\")",
    "json": "\"}],\"verdict\":\"pass\",\"x\":[{\"",
    "crlf": "a\r\nb\rc\nd\r\n",
    "blank": " \t\n ",
    "empty": "",
    "megabyte": "A" * 2**20,
    "many-lines": "::error::x\n" * 2000,
    "megabyte-of-backticks": "`" * 2**20,
}  # fmt: skip

ACTIVE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff0-\uffff\ud800-\udfff\U000e0000-\U0010ffff]"
)
"""Characters that steer a terminal, reorder a text, hide in it or break a line."""


def commands(text: str) -> Iterator[tuple[str, str, str]]:
    """(name, properties, message) of what the GitHub runner would take for a command in a log, as it parses one.

    It trims a line and looks for `::name properties::message` at its start, else for `##[name properties]message` anywhere.
    """
    for line in text.splitlines():
        trimmed = line.lstrip()
        if trimmed.startswith("::") and (end := trimmed.find("::", 2)) > 0:
            name, _, properties = trimmed[2:end].partition(" ")
            yield name, properties, trimmed[end + 2 :]
        elif (start := line.find("##[")) >= 0 and (end := line.find("]", start)) > 0:
            name, _, properties = line[start + 3 : end].partition(" ")
            yield name, properties, line[end + 1 :]


def file_commands(text: str) -> dict[str, str]:
    """What the GitHub runner reads from `$GITHUB_OUTPUT`: the last value of each name."""
    found: dict[str, str] = {}
    lines = iter(text.split("\n"))
    for line in lines:
        equals, heredoc = line.find("="), line.find("<<")
        if equals >= 0 and (heredoc < 0 or equals < heredoc):
            found[line[:equals]] = line[equals + 1 :]
        elif heredoc >= 0:
            end, value = line[heredoc + 2 :], []
            for more in lines:
                if more == end:
                    break
                value.append(more)
            else:
                raise ValueError(f"no {end} after {line}")
            found[line[:heredoc]] = "\n".join(value)
        elif line:
            raise ValueError(f"not an output: {line}")
    return found
