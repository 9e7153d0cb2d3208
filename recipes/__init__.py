"""The recipes that ship with graphwright: one YAML file each, read as package data."""
