"""Installs the top-level folders as subpackages of `staticvl`; see docs/architecture.md for why."""

from pathlib import Path

from setuptools import setup

FOLDERS = ("compiler", "model_defs", "runtime", "tools", "weights")
HERE = Path(__file__).parent
PACKAGE = "tools/package"  # what stands in `staticvl/` itself: no folder of the checkout is that
CHECKOUT_ONLY = "tools/development"  # makes or tests what a wheel brings ready-made; docs/architecture.md
VERSION = "0.2.0"


def packages() -> dict[str, str]:
    """Package name -> folder, for every folder of ours that holds Python files and is not for a checkout alone."""
    inits = (init for top in FOLDERS for init in (HERE / top).rglob("__init__.py"))
    folders = (init.parent.relative_to(HERE) for init in inits)
    ours = (f for f in folders if not f.is_relative_to(CHECKOUT_ONLY) and f != Path(PACKAGE))
    return {"staticvl": PACKAGE} | {"staticvl." + ".".join(f.parts): str(f) for f in ours}


RUNTIME = [
    "numpy>=1.26,<3",
    "onnxruntime>=1.27,<1.33",
    "msgspec>=0.19,<1",
    "pillow>=11,<14",
    "jinja2>=3.1.5,<4",
    "tokenizers>=0.21,<0.24",
    "sentencepiece>=0.2,<0.3",
    "tiktoken>=0.9,<0.15",
    "tqdm>=4.66,<5",
    "psutil>=6,<8",
    "rich>=13.7,<16",
    "onnx>=1.19,<1.24",  # imported only to share packed weights between graphs
]
COMPILE = ["torch==2.13.0", "safetensors>=0.5,<1", "pyyaml>=6,<7"]
ASCEND = [*COMPILE, "torch_npu==2.13.0"]  # on a machine with CANN; elsewhere torch cannot be imported beside it
CONSTRAIN = ["llguidance>=1.3,<2"]  # answers by JSON schema, regular expression or choice
TUNE = [*COMPILE, "matplotlib>=3.9,<4"]  # tune-buckets; matplotlib draws its report
SERVE = ["fastapi>=0.160,<0.170", "uvicorn>=0.50,<0.60", "pydantic>=2.12,<3", "prometheus-client>=0.22,<0.30"]
COMPLETION = ["shtab>=1.13,<2"]  # writes the scripts of --completion
SIGN = ["cryptography>=44,<52"]  # sign, and --key of verify, --verify-key of what runs an artifact
RUFF = "ruff==0.17.5"
DOCS = [  # make docs
    "mkdocs>=1.6,<2",
    "mkdocs-material>=9.7,<10",
    "mkdocstrings>=1.0,<2",
    "mkdocstrings-python>=2.0,<3",
    RUFF,  # lays signatures out
]
TEST = [
    *TUNE,
    *CONSTRAIN,
    *SERVE,
    *SIGN,
    *COMPLETION,
    "setuptools>=77",  # builds the wheel that is tested
    "packaging>=24.2",  # reads its metadata
    "openai>=3,<4",
    "httpx2>=2,<3",  # as openai's client does
    "playwright>=1.56,<2",  # drives a Chromium where there is one
    "nbclient>=0.10,<0.12",  # runs the notebooks of examples/
    "nbformat>=5.10,<6",
    "ipykernel>=6.29,<8",
    "pytest>=8,<10",
    "pytest-xdist>=3.6,<4",
    "transformers>=5.20,<5.24",
    "protobuf>=5,<8",
    "peft>=0.18,<0.22",
    "compressed-tensors>=0.20,<0.21",  # packs what we read
    "hypothesis>=6.100,<7",
    RUFF,
    "pyright==1.1.414",
]

CLASSIFIERS = [  # no licence among them: the expression replaces it
    "Environment :: Console",
    "Intended Audience :: Developers",
    "Operating System :: POSIX :: Linux",
    "Programming Language :: Python :: 3",
    "Programming Language :: Python :: 3 :: Only",
    *(f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13)),
    "Topic :: Scientific/Engineering :: Artificial Intelligence",
    "Typing :: Typed",
]

setup(
    name="staticvl",
    version=VERSION,
    author="The staticvl developers",
    description="Vision-language models compiled to graphs of fixed, bucketed shapes",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    keywords="vision-language models, multimodal, inference, static graphs, ONNX, Ascend, quantization",
    classifiers=CLASSIFIERS,
    python_requires=">=3.11",
    packages=sorted(packages()),
    package_dir=packages(),
    package_data={
        "staticvl": ["py.typed"],
        "staticvl.runtime.backends.ge_simulator.card_rules": ["*.json"],
        "staticvl.tools": ["assets/**/*"],
        "staticvl.tools.serving": ["page.html"],
    },
    install_requires=RUNTIME,
    extras_require={
        "compile": COMPILE,
        "ascend": ASCEND,
        "constrain": CONSTRAIN,
        "tune": TUNE,
        "serve": SERVE,
        "sign": SIGN,
        "completion": COMPLETION,
        "docs": DOCS,
        "test": TEST,
    },
    entry_points={"console_scripts": ["staticvl = staticvl.tools.cli:main"]},
)
