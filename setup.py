from setuptools import find_packages, setup


setup(
    name="modeling-vwlmm",
    version="0.1.0",
    description="VW-LMM, multi-modal auto-regressive modeling via visual words, for the Hugging Face libraries",
    long_description=open("README.md", encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["modeling_vwlmm"]),
    package_data={"modeling_vwlmm": ["chat_templates/*.jinja"]},
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.9,<2.14",
        "transformers>=5.23,<5.24",
        "trl>=1.16,<1.17",
        "peft>=0.21,<0.22",
        "accelerate>=1.15,<2",
        "datasets>=5.2,<6",
        "safetensors>=0.8,<1",
        "huggingface_hub>=2.4,<3",
        "numpy>=1.26,<3",
        "pillow>=11,<14",
        "sentencepiece>=0.2,<0.3",
        "protobuf>=5,<8",
        "pyarrow>=20,<30",
        "pyyaml>=6,<7",
    ],
    extras_require={
        "quickstart": ["easy-vqa==1.0"],
        "gguf": ["gguf>=0.19,<1"],
        "qlora": ["bitsandbytes>=0.50,<1"],
        "test": ["easy-vqa==1.0", "gguf>=0.19,<1", "bitsandbytes>=0.50,<1", "pytest>=9,<10"],
        "quality": ["ruff==0.17.6"],
    },
    entry_points={"console_scripts": ["vwlmm = modeling_vwlmm.cli:main"]},
)
