"""Implementations of `jetrt.InferenceRuntime`; each is imported when it is asked for by name."""
