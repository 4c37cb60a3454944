"""Text to training batches: tokenizer, corpora, documents, token store, prepare, loader."""
