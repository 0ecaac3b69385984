"""The version of this package: what `--version` prints and every manifest carries."""

__version__ = "0.1.0"
