"""Edits of rows: what they write, patches of them, and measurements of what they do."""
