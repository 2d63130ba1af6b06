"""Version of the client."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("mintrpc")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0.0.0"
