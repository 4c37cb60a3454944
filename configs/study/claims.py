"""What the study claims, written down before its first run; nothing here changes afterwards.

Each claim is about a difference, `variant` less `against`, paired by seed. Fewer bits per byte are
better. At most eight: each further one widens the intervals of all (Holm). What is not here and
is measured all the same is called exploratory.
"""

from stem_jax.study.claims import MARGIN, Claim
from stem_jax.study.measured import BITS, SHARE

TEST, GAP = "test_bits_per_byte", "memorization_gap"

CLAIMS = (
    Claim(
        name="stem-beats-dense",
        says="STEM in half of the layers foretells unseen text better than the dense model.",
        measure=TEST,
        unit=BITS,
        variant="stem_half",
        against="dense",
        text="prose",
        side="below",
    ),
    Claim(
        name="stem-beats-its-size",
        says="STEM in half of the layers is better than a dense model of its active size.",
        measure=TEST,
        unit=BITS,
        variant="stem_half",
        against="dense_minus",
        text="prose",
        side="below",
    ),
    Claim(
        name="stem-memorises",
        says="STEM is further ahead on the text that it was trained on than on unseen text.",
        measure=GAP,
        unit=BITS,
        variant="stem_half",
        against="dense",
        text="prose",
        side="above",
    ),
    Claim(
        name="value-no-worse",
        says="With a third of the table, value embeddings are no worse than STEM half.",
        measure=TEST,
        unit=BITS,
        variant="value",
        against="stem_half",
        text="prose",
        side="no_worse",
        margin=MARGIN,
    ),
    Claim(
        name="gate-loses",
        says="Rows in the gate's place, drawn as published, are worse than the dense model.",
        measure=TEST,
        unit=BITS,
        variant="gate",
        against="dense",
        text="prose",
        side="above",
    ),
    Claim(
        name="hash-moe-ahead",
        says="With so few tokens, a mixture of experts by hash of the same size is ahead of STEM.",
        measure=TEST,
        unit=BITS,
        variant="hash_moe",
        against="stem_half",
        text="prose",
        side="below",
    ),
    Claim(
        name="ngram-best",
        says="N-gram memories with as large a table are better than STEM in half of the layers.",
        measure=TEST,
        unit=BITS,
        variant="ngram",
        against="stem_half",
        text="prose",
        side="below",
    ),
    Claim(
        name="ngram-long-names",
        says="Of countries whose names are several tokens, n-gram memories answer more than STEM.",
        measure="facts_told_several_tokens",
        unit=SHARE,
        variant="ngram",
        against="stem_half",
        text="facts",
        side="above",
    ),
)
