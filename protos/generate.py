"""Generate the package `contracts` from protos/: messages, stubs and their types.

protoc writes imports as if every contract were a top-level module (`from sum.v1 import sum_pb2`); here they live under
one package, so that nothing called `sum` or `person` can shadow, or be shadowed by, anybody's module.

The contracts of JSON-RPC services are Python to begin with: protocol classes, which are copied beside the rest.
"""

import re
import shutil
import sys
import tempfile
from pathlib import Path

import grpc_tools
from grpc_tools import protoc

PROTOS = Path(__file__).parent
PACKAGE = PROTOS.parent / "contracts"


def main() -> int:
    """Write contracts/ anew, all of it or nothing."""
    sources = sorted(str(path.relative_to(PROTOS)) for path in PROTOS.rglob("*.proto"))
    roots = {source.split("/")[0] for source in sources}
    well_known = Path(grpc_tools.__file__).parent / "_proto"
    with tempfile.TemporaryDirectory(dir=PROTOS.parent, prefix=".contracts-") as folder:
        out = Path(folder)
        outputs = [f"--{kind}_out={out}" for kind in ("python", "grpc_python")]
        outputs += [f"--{kind}_out=quiet:{out}" for kind in ("mypy", "mypy_grpc")]
        if protoc.main(["protoc", f"-I{PROTOS}", f"-I{well_known}", *outputs, *sources]):
            return 1  # protoc has said what is wrong
        ours = re.compile(rf"^(from|import) (?=(?:{'|'.join(sorted(roots))})\.)", re.MULTILINE)
        for path in [*out.rglob("*.py"), *out.rglob("*.pyi")]:
            path.write_text(ours.sub(rf"\1 {PACKAGE.name}.", path.read_text()))
        for written in PROTOS.glob("*/**/*.py"):
            target = out / written.relative_to(PROTOS)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(written, target)
        for directory in [out, *(path for path in out.rglob("*") if path.is_dir())]:
            (directory / "__init__.py").touch()
        shutil.rmtree(PACKAGE, ignore_errors=True)
        shutil.copytree(out, PACKAGE)
    print(f"contracts/: generated from {len(sources)} protos")
    return 0


if __name__ == "__main__":
    sys.exit(main())
