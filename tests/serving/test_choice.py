"""One completion as it grows: whole characters, its tokens, and where a stop string cuts it."""

from stem_jax.serving.choice import Choice
from stem_jax.serving.request import Step
from stem_jax.serving.token_text import TokenTexts
from tests.serving.served import BYTES

EOS = 257


def pieces(ids, stops=(), finish="length"):
    """What each step gives; the last has a finish."""
    choice = Choice(0, BYTES, BYTES.encode_prompt("x"), stops, TokenTexts(BYTES))
    found = []
    for place, token in enumerate(ids):
        last = place == len(ids) - 1
        found.append(choice.push(Step(token, -1.0, (), finish if last else None)))
        if choice.finish is not None:
            break
    return found, choice


def test_characters_are_whole_and_tokens_are_shown_with_their_bytes():
    found, choice = pieces("a€b".encode())
    assert [piece.text for piece in found] == ["a", "", "", "€", "b"]
    steps = [step for piece in found for step in piece.steps]
    assert [step.text for step in steps] == ["a", "bytes:\\xe2", "bytes:\\x82", "bytes:\\xac", "b"]
    assert bytes(byte for step in steps for byte in step.bytes).decode() == "a€b"
    assert [step.offset for step in steps] == [0, 1, 1, 1, 2]
    assert (choice.finish, choice.tokens) == ("length", 5)


def test_a_stop_id_gives_no_text_and_is_not_shown():
    found, choice = pieces([*b"ab", EOS], finish="stop")
    assert [piece.text for piece in found] == ["a", "b", ""]
    assert [len(piece.steps) for piece in found] == [1, 1, 0]
    assert (choice.finish, choice.tokens) == ("stop", 3)


def test_what_is_held_back_goes_out_at_the_end():
    assert [piece.text for piece in pieces(b"abc", ["cd"])[0]] == ["a", "b", "c"]
    found, _ = pieces([*b"abc", EOS], ["cd"], "stop")
    assert [piece.text for piece in found] == ["a", "b", "", "c"]
    # Half a character at the end, too.
    assert [piece.text for piece in pieces("a€".encode()[:-1])[0]] == ["a", "", "\ufffd"]


def test_tokens_of_a_stop_string_are_not_shown():
    found, choice = pieces(b"abcdef", ["cde"])
    assert [piece.text for piece in found] == ["a", "b", "", "", ""]
    assert [step.text for piece in found for step in piece.steps] == ["a", "b"]
    assert (choice.finish, choice.tokens) == ("stop", 5)
    # The first one of a stop string that did not come is shown with its text.
    found, _ = pieces(b"abcdx", ["cde"])
    assert [len(piece.steps) for piece in found] == [1, 1, 0, 0, 3]


def test_tokens_without_text_have_a_name():
    texts = TokenTexts(BYTES)
    assert texts.token(EOS, -1.0).text == "token_id:257"
    assert texts.token(EOS, float("-inf")).logprob == -9999.0
