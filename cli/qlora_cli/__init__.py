"""The commands of `qlora`, which is `kubectl qlora` too."""
