"""Version of the client, and of the surface that it follows."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("mintrpc")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0.0.0"

__tinker_version__ = "0.38.0"  # of the SDK whose public names docs/compatibility.md goes through
