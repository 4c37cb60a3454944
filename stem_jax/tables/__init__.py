"""Token-indexed tables: where a row lives, how rows travel, and how they are updated.

Nothing here knows of tokens or transformers: a table is addressed by integer keys.
"""
