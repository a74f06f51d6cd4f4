"""LightningDataModules and their data sets, one a file; import each from its own module."""
