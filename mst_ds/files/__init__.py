"""Files: those that users write, those that ship with the package, and how one is written whole or not at all."""
