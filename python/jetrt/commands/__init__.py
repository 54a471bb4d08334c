"""Commands of `jetrt`, one module each; `jetrt.cli` puts them together."""
