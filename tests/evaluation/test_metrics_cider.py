"""CIDEr-D by hand and beside pycocoevalcap's own numbers; words beside those of its tokenizer."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_lvlm.evaluation.metrics import METRICS, Outcome, Truth, score_set
from moe_lvlm.evaluation.metrics.caption_words import caption_words
from moe_lvlm.evaluation.metrics.cider import NUM_CANDIDATES, References, cider


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        # what pycocoevalcap 1.2's PTBTokenizer gave for these (OpenJDK 17, each followed by a line of its own)
        ("A large brown bed with white pillows and tan sheets.", "a large brown bed with white pillows and tan sheets"),
        ("A red, white and blue kit flying among the sky.", "a red white and blue kit flying among the sky"),
        ('"Weak Bladder" written in German', "weak bladder written in german"),
        ("The three giraffe's are standing in it's lap.", "the three giraffe 's are standing in it 's lap"),
        ("can't don't won't cannot gonna", "ca n't do n't wo n't can not gon na"),
        ("I'm he'd we're they've she'll dogs'", "i 'm he 'd we 're they 've she 'll dogs"),
        ("it’s “here” and ‘there’", "it 's here and there"),
        ("two t-shirts, a black-and-white 5-year-old", "two t-shirts a black-and-white 5-year-old"),
        ("x-ray 2-story 3-D 3.5-inch 1,000-year", "x-ray 2-story 3-d 3.5-inch 1,000-year"),
        ("No parking 8 A.M. to 6 P.M. in the U.S.", "no parking 8 a.m. to 6 p.m. in the u.s."),
        ("Dr. Who and Mr. Smith on Main St.", "dr. who and mr. smith on main st."),
        ("No. 5 and no more no.", "no. 5 and no more no"),
        ("in the wash. Wash. D.C.", "in the wash wash. d.c."),
        ("$1.99 or 50% off 1,000 at 10:30am", "$ 1.99 or 50 % off 1,000 at 10:30 am"),
        ("1st 4x4 7up mp3 3d 1980s '80s", "1st 4x4 7up mp3 3d 1980s '80s"),
        ("and/or 24/7 a/b/c w/ ice", "and/or 24/7 a/b/c w / ice"),
        ("a B&W photo, salt&pepper & AT&T", "a b&w photo salt & pepper & at&t"),
        ("a cat (sleeping) [left]", "a cat -lrb- sleeping -rrb- -lsb- left -rsb-"),
        ("wait -- no - yes – so — on ... end", "wait no yes so on end"),
        ("hey! hey!! what?!", "hey hey !! what ?!"),
        ("a tree.the dog tree,the cat", "a tree.the dog tree the cat"),
        ("three o'clock ma'am, O'Brien's rock 'n' roll", "three o'clock ma'am o'brien 's rock 'n' roll"),
        ("player #23 with #fun foo_bar a=b", "player # 23 with #fun foo_bar a = b"),
        ("see www.foo.com or me@foo.com", "see www.foo.com or me@foo.com"),
        ("Coca-Cola® €5 90° café 日本 😀", "coca-cola ® $ 5 90 ° café 日本"),
        ("", ""),
    ],
)
def test_words_are_those_of_the_published_tokenizer(caption: str, words: str) -> None:
    assert caption_words(caption) == words.split()


@given(st.text())
def test_words_of_any_text(text: str) -> None:
    assert all(word and not any(map(str.isspace, word)) for word in caption_words(text))
    assert caption_words(f"  {text}\n") == caption_words(text)


def test_two_images_by_hand() -> None:
    # idf: "a" 0 (both images), "dog", "cat", "a dog", "a cat" log 2; equal captions: cosine 1 for n = 1 and 2, 0 for
    # the longer ones that nobody has -> 10 (1 + 1 + 0 + 0) / 4; "a dog" beside "a cat" shares only "a"
    assert cider(["a dog", "A dog."], [["a dog"], ["a cat"]]) == pytest.approx([5.0, 0.0])


@pytest.mark.parametrize("images", range(2, 200, 7))
def test_what_all_images_have_counts_nothing(images: int) -> None:
    assert cider(["a dog"] * images, [["a dog"]] * images) == [0.0] * images


def test_clipping_and_length_by_hand() -> None:
    # in units of the idf, n = 1: red 1, dog 3 beside red 2, dog 1, clipped to 1 and 1: (1 x 2 + 1 x 1) / sqrt(10 x 5)
    # n = 2: "red dog" 1, "dog dog" 2 beside "red red" 1, "red dog" 1: 1 / sqrt(5 x 2); longer ones: none in common
    # 4 words beside 3: exp(-1 / 72)
    expected = 10 * (3 / math.sqrt(50) + 1 / math.sqrt(10)) / 4 * math.exp(-1 / 72)
    assert cider(["red dog dog dog", "cow"], [["red red dog"], ["cat"]]) == pytest.approx([expected, 0.0])


def test_several_references_count_by_their_mean() -> None:
    # as in the first: 5 beside "a dog", 0 beside "a cow"; "a" is in both images
    assert cider(["a dog", "a cat"], [["a dog", "a cow"], ["a cat"]]) == pytest.approx([2.5, 5.0])


CAPTIONS = (
    (
        "A man rides a wave on a surfboard.",
        "A man riding a wave on top of a surfboard.",
        "a surfer rides a big wave",
        "A man surfs in the ocean, wearing a black wet suit.",
    ),
    (
        "a dog's t-shirt",
        "The dog's wearing a T-shirt.",
        "A dog in a red t-shirt (size 3) sits on a couch.",
        "a dog that can't take off its shirt",
    ),
    (
        'A sign that says "No Parking" on Main St.',
        'A sign reads "No parking 8 a.m. to 6 p.m." on Main St.',
        "There is a no-parking sign on Main St. in St. Paul.",
        "A street sign: no parking!",
    ),
    (
        "a bottle of Coca-Cola that costs $1.99",
        "A Coca-Cola bottle for $1.99",
        "a bottle of soda & a price tag of $1.99",
        "Coke costs 1.99 $",
    ),
    (
        "two zebras standing in a field of grass and trees and grass and trees and grass",
        "Two zebras stand in a field.",
        "two zebras standing in a grassy field",
    ),
    ("", "A train at the station", "a red train is parked at a station - it's empty"),
    ("the the the the", "The clock shows 10:30.", "A clock on the wall at 10:30am"),
    (
        "A man in a black-and-white photo",
        "B&W photo of a man",
        "a black-and-white photo of a man and/or a woman",
        "An old black and white photograph of a man...",
    ),
)
"""A caption and its references, an image each."""

# pycocoevalcap 1.2: PTBTokenizer().tokenize of both, then Cider().compute_score; the last is the best mean that it gave
# for any reference as the caption of every image ("two zebras standing in a grassy field")
PUBLISHED = (
    1.6570123202,
    1.3059121743,
    1.8919177311,
    1.8251555338,
    0.6684049862,
    0.0,
    0.0976683438,
    1.7163806681,
)
PUBLISHED_MEAN = 1.1453064697
PUBLISHED_BEST_CONSTANT = 0.7816846016


def outcomes() -> list[Outcome]:
    return [Outcome("caption", said, Truth(wanted[0], references=tuple(wanted))) for said, *wanted in CAPTIONS]


def test_scores_are_those_of_the_published_code() -> None:
    scores = score_set(outcomes(), "cider")
    assert scores.credits == pytest.approx(PUBLISHED, abs=1e-9)
    score = scores.by_task["caption"]
    assert (score.accuracy, score.n) == (pytest.approx(PUBLISHED_MEAN, abs=1e-9), 8)
    assert score.majority == pytest.approx(PUBLISHED_BEST_CONSTANT, abs=1e-9)
    # the captions have 8, 4, 9, 8, 16, 0, 4 and 6 words, their 21 references 170, as the published tokenizer cuts them
    assert score.details == {"words": 55 / 8, "reference_words": 170 / 21}


def test_an_image_counts_among_those_of_its_task() -> None:
    # one set, two tasks in turn: each is scored as if it were alone
    mixed = [
        Outcome(("even", "odd")[place % 2], outcome.prediction, outcome.truth)
        for place, outcome in enumerate(outcomes())
    ]
    found = score_set(mixed, "cider")
    for task, start in (("even", 0), ("odd", 1)):
        alone = cider([o.prediction for o in mixed[start::2]], [o.truth.references for o in mixed[start::2]])
        assert found.credits[start::2] == alone
        assert found.by_task[task].accuracy == pytest.approx(sum(alone) / 4)


def test_best_constant_by_hand() -> None:
    # idf: "dog" and "a dog" log 3/2, "cat" and "a cat" log 3, "a" 0. "a dog" everywhere: 5, 5, 0; "a cat": 0, 0, 5
    assert References([["a dog"], ["a dog"], ["a cat"]]).best_constant() == pytest.approx(10 / 3)


@given(
    st.lists(
        st.lists(st.lists(st.sampled_from("abcde"), max_size=6).map(" ".join), min_size=1, max_size=3),
        min_size=2,
        max_size=6,
    )
)
def test_best_constant_beside_all_references(references: list[list[str]]) -> None:
    means = [
        sum(cider([caption] * len(references), references)) / len(references)
        for captions in references
        for caption in captions
    ]
    assert References(references).best_constant() == pytest.approx(max(means))


def test_of_many_references_the_likeliest_are_tried() -> None:
    # more odd captions than are tried, each the only one of its kind; two images share theirs
    odd = [[f"odd{number} odd{number} odd{number} odd{number}"] for number in range(2 * NUM_CANDIDATES)]
    shared = [["a small grey dog"], ["a small grey dog"]]
    # each odd one gets 10 for its own image (10 for cosine 1 at all four lengths), the shared one 20
    assert References([*odd, *shared]).best_constant() == pytest.approx(20 / (2 * NUM_CANDIDATES + 2))


def test_captions_are_neither_right_nor_wrong() -> None:
    assert METRICS["cider"].verdict(1.25) == {"correct": None, "credit": 1.25}
    assert METRICS["vqa"].verdict(0.3) == {"correct": False, "credit": 0.3}
    assert METRICS["choice"].verdict(1.0) == {"correct": True}


def test_records_that_cannot_be_scored() -> None:
    check = METRICS["cider"].check
    check(Truth("x", references=("", "a dog")))
    for references in ((), (" . ", "")):
        with pytest.raises(ValueError, match=r"references: .*; allowed: at least one caption with a word in it"):
            check(Truth("x", references=references))
    with pytest.raises(ValueError, match="references: of 1 image; allowed: at least 2"):
        METRICS["cider"].check_set([Truth("x", references=("a dog",))])
