"""Of the torch that this stands in for: one without the C exchange table, as JetPack's wheels are."""

__version__ = "2.9.1+standin"
cuda = "12.6"
hip = None
git_version = "standin"
