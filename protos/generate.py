"""Write the Python stubs of protos/quantplane/v1 into client/quantplane/v1.

The compiler is the oldest grpcio-tools whose output the newest protobuf runtime
still accepts, so that the client installs beside other people's pins. It stays
out of the environment (its own pins are as old as itself): it is unpacked into
build/protoc and used from there.

    python protos/generate.py           write the stubs
    python protos/generate.py --check   fail if the committed ones differ
"""

import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

COMPILER = "grpcio-tools==1.72.1"

PROTOS = Path(__file__).resolve().parent
ROOT = PROTOS.parent
STUBS = ROOT / "client" / "quantplane" / "v1"
TOOLS = ROOT / "build" / "protoc" / f"{COMPILER}-py{sys.version_info.minor}"


def install_compiler() -> None:
    if not TOOLS.exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        subprocess.run([*pip, "--target", TOOLS, COMPILER], check=True)


def generate(target: Path) -> None:
    """Compile every proto into `target`, which stands for client/."""
    sources = sorted(str(p.relative_to(PROTOS)) for p in PROTOS.rglob("*.proto"))
    outputs = [f"--{kind}_out={target}" for kind in ("python", "grpc_python")]
    scripts = sysconfig.get_path("scripts")
    environment = {
        **os.environ,
        "PYTHONPATH": str(TOOLS),
        "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
    }
    subprocess.run(
        [
            *(sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTOS}"),
            *outputs,
            f"--mypy_out=quiet:{target}",
            f"--mypy_grpc_out=quiet,only_async:{target}",
            *sources,
        ],
        check=True,
        env=environment,
    )
    package = target / "quantplane" / "v1"
    for module in package.glob("*_pb2_grpc.py"):
        if "Servicer" not in module.read_text():  # a proto without services
            module.unlink()
            module.with_suffix(".pyi").unlink()
    modules = sorted(p.stem for p in package.glob("*_pb2*.py"))
    lines = [
        f"from quantplane.v1.{module} import *  # noqa: F403" for module in modules
    ]
    (package / "__init__.py").write_text(
        '"""The messages and stubs of quantplane.v1. Generated; do not edit."""\n\n'
        + "\n".join(lines)
        + "\n"
    )


def contents(folder: Path) -> dict[str, bytes]:
    """Return the generated files of a folder by name."""
    return {p.name: p.read_bytes() for p in folder.glob("*.py*") if p.is_file()}


def main() -> None:
    install_compiler()
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        fresh = contents(Path(folder, "quantplane", "v1"))
    if "--check" in sys.argv[1:]:
        if fresh != contents(STUBS):
            sys.exit("The stubs are stale: run `python protos/generate.py`.")
        return
    STUBS.mkdir(parents=True, exist_ok=True)
    for name in contents(STUBS).keys() - fresh.keys():
        (STUBS / name).unlink()
    for name, data in fresh.items():
        (STUBS / name).write_bytes(data)


if __name__ == "__main__":
    main()
