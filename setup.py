"""Build script. Everything about the package is in pyproject.toml; this file is the place for compiled extensions."""

from setuptools import setup

setup()
