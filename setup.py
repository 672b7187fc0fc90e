"""Packaging of Kith: `pip install .` and `python -m build`.

Ranges here, pins in requirements.lock; `make lock` derives the second from the first.
"""

from setuptools import find_packages, setup

PACKAGES = ["index_builder", "transforms", "pipelines"]

RUNTIME = [
    "apache-beam[gcp]>=2.72,<2.73",
    # tensorflow-io 0.37.1 is the last release and its plugins load in TensorFlow 2.16 alone.
    "tensorflow>=2.16.2,<2.17",
    "tensorflow-io==0.37.1",
    "keras>=3.15,<3.16",
    "faiss-cpu>=1.15.1,<1.16",
    "fsspec>=2025.12",
    "gcsfs>=2025.12",
    "google-cloud-storage>=2.19,<4",
    "google-crc32c>=1.5",
    "h5py>=3.11,<4",
    "jinja2>=3.1,<4",
    "numba>=0.60",
    "numpy>=1.26.4,<2",
    # Decodes HEIC; pillow-heif is the same with an encoder under the GPL.
    "pi-heif>=1.4,<2",
    "pillow>=12.1,<13",
    "protobuf>=4.25.8,<5",
    "pyarrow>=23,<24",
    "pydantic>=2.7,<3",
    "pyyaml>=6",
    "rich>=13.7",
    "scipy>=1.13",
    # The last line of releases that carries pkg_resources, which tensorboard 2.16 imports.
    "setuptools>=77,<81",
    "simplejpeg>=1.9,<2",
    "threadpoolctl>=3.5",
    "typer>=0.15",
]

# Engines: one of the first two on a machine with GPUs (they want different versions of cuDNN).
GPU = ["tensorflow[and-cuda]>=2.16.2,<2.17"]
# The newest that goes with TensorFlow 2.16 (ml-dtypes).
JAX = ["jax[cuda12]==0.4.34"]
OPENVINO = ["openvino>=2026.4,<2027"]

DEVELOPMENT = [
    *OPENVINO,
    "build>=1.2",
    "gcp-storage-emulator>=2024.8.3",
    "hypothesis>=6.100",
    "import-linter>=2.1",
    "jax==0.4.34",
    "jaxlib==0.4.34",
    "mypy>=1.11",
    "pillow-heif>=1.8,<2",
    "pydicom>=3.0,<4",
    "pytest>=8.2",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
    "ruff>=0.6",
    "types-PyYAML>=6.0.12",
    "uv>=0.5",
    "wheel>=0.43",
]

setup(
    name="kith-index",
    version="0.1.0",
    description="Bulk similar-item recommendations from a catalogue of images, every night.",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    python_requires=">=3.11,<3.13",
    packages=find_packages(include=[*PACKAGES, *(f"{name}.*" for name in PACKAGES)]),
    package_data={
        "index_builder": ["py.typed"],
        "transforms": ["py.typed"],
        "transforms.encoders": ["weights/*", "weights/*/*"],
        "pipelines": ["py.typed"],
        "pipelines.report": ["*.j2", "*.css"],
    },
    include_package_data=False,
    zip_safe=False,
    install_requires=RUNTIME,
    extras_require={"dev": DEVELOPMENT, "gpu": GPU, "jax": JAX, "openvino": OPENVINO},
    entry_points={"console_scripts": ["kith = pipelines.cli:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Environment :: Console",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
)
