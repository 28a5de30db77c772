"""Rows of a dataset: of which kind they are, by their columns, and what a row of each kind must hold."""
