"""What pyproject.toml cannot say: kernels/ is installed as seemore_fast.kernels, never as a module `kernels`."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["seemore_fast*"]), "seemore_fast.kernels"],
    package_dir={"seemore_fast.kernels": "kernels"},
)
