"""The algorithms; a configuration names them by their keys in the registry of builders."""
