"""How much text is in the stores of a folder, for a person or a program."""

from typing import Any

from stem_jax.data.token_store import TokenStore


def summarize(stores: dict[str, TokenStore]) -> dict[str, Any]:
    """Counts for a person or a program: over all splits, then for each."""
    total = {
        key: sum(getattr(store, f"num_{key}") for store in stores.values())
        for key in ("documents", "bytes", "tokens")
    }
    meta = stores["train"].meta
    # Of conversations the bytes are those of the answers.
    scored = sum(store.num_scored for store in stores.values())
    measured = scored if meta.has_scored else total["tokens"]
    summary = {
        **total,
        **({"scored_tokens": scored} if meta.has_scored else {}),
        "bytes_per_token": round(total["bytes"] / measured, 4),
        "vocab_size": meta.vocab_size,
        "fingerprint": meta.fingerprint,
    }
    if meta.left_out:
        summary["left_out_share"] = round(meta.left_out, 6)
    for split, store in stores.items():
        summary[f"{split}_documents"] = store.num_documents
        summary[f"{split}_tokens"] = store.num_tokens
    return summary


def format_summary(summary: dict[str, Any]) -> str:
    """`summarize` as aligned lines, with sizes in MB."""
    lines = []
    for key, value in summary.items():
        if key == "bytes":
            key, value = "text", f"{value / 1e6:.2f} MB"
        elif isinstance(value, int):
            value = f"{value:,}"
        lines.append(f"{key.replace('_', ' '):<22}{value}")
    return "\n".join(lines)
