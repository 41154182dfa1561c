"""Scores of answers: pure functions of texts."""

import re
from collections.abc import Callable, Sequence


_ARTICLES = {"a", "an", "the"}
_NUMBERS = "none zero one two three four five six seven eight nine ten".split()
_NUMBER_WORDS = {word: str(max(i - 1, 0)) for i, word in enumerate(_NUMBERS)}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_PERIOD = re.compile(r"\.(?!\d)")  # those that are no decimal point
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
# As the challenge writes them, which accepts answers without their apostrophe. "'d've" and the like are rare answers
_CONTRACTIONS = {
    word.replace("'", ""): word
    for word in (
        "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd "
        "he'd've he's how'd how'll how's i'd've i'm i've isn't it'd it'd've it'll let's ma'am mightn't mightn't've "
        "might've mustn't must've needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've "
        "somebody'd somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd "
        "something'd've something'll that's there'd there'd've there're there's they'd they'd've they'll they're "
        "they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've "
        "who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll "
        "y'all'd've you'd you'd've you'll you're you've"
    ).split()
}


def normalize(answer: str) -> str:
    """An answer as the VQA challenge compares it (https://visualqa.org/evaluation.html).

    In lower case, without articles and punctuation (a decimal point stays), small numbers as digits, contractions with
    their apostrophe.
    """
    text = answer.replace("\n", " ").replace("\t", " ").strip()
    has_number = _COMMA_IN_NUMBER.search(text) is not None
    found = text
    for sign in _PUNCTUATION:
        if sign in text:
            # A sign beside a blank separates nothing, and neither does any where a number is written with commas
            found = found.replace(sign, "" if f"{sign} " in text or f" {sign}" in text or has_number else " ")
    words = [_NUMBER_WORDS.get(word, word) for word in _PERIOD.sub("", found).lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 if the answer is one of the references, both normalized, else 0."""
    return float(normalize(answer) in map(normalize, references))


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """The VQA challenge's accuracy of an answer that several people gave, 10 there.

    min(1, matches / 3) among all references but one, mean over which one is left out.
    """
    matches = [normalize(reference) == normalize(answer) for reference in references]
    return sum(min(1.0, (sum(matches) - match) / 3) for match in matches) / len(matches)


def _of_captions(name: str) -> Callable[[Sequence[str], Sequence[Sequence[str]]], list[float]]:
    def score(answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
        try:
            from pycocoevalcap.cider.cider import Cider
            from pycocoevalcap.rouge.rouge import Rouge
        except ImportError as error:
            raise ImportError(f'{name} needs pycocoevalcap: pip install "modeling-vwlmm[captions]"') from error
        scorer = {"rouge_l": Rouge, "cider": Cider}[name]()
        wanted = {i: [_words(text) for text in texts] for i, texts in enumerate(references)}
        said = {i: [_words(answer)] for i, answer in enumerate(answers)}
        return [float(value) for value in scorer.compute_score(wanted, said)[1]]

    return score


def _words(text: str) -> str:
    """Lower case, words apart and without punctuation, as captions are compared; COCO's own tokenizer needs Java."""
    return " ".join(re.findall(r"[\w'-]+", text.lower()))


def _each(score: Callable[[str, Sequence[str]], float]):
    return lambda answers, references: [score(a, r) for a, r in zip(answers, references, strict=True)]


# Metric: the answers and the references of all questions to a score each
METRICS: dict[str, Callable[[Sequence[str], Sequence[Sequence[str]]], list[float]]] = {
    "exact_match": _each(exact_match),
    "vqa_accuracy": _each(vqa_accuracy),
    "rouge_l": _of_captions("rouge_l"),
    "cider": _of_captions("cider"),
}
# What a metric is called in a table
TITLES = {
    "exact_match": "right answers",
    "vqa_accuracy": "VQA accuracy",
    "rouge_l": "ROUGE-L",
    "cider": "CIDEr",
}


def fitting_metrics(references: Sequence[Sequence[str]]) -> list[str]:
    """What is measured if nothing is asked for: VQA accuracy where every question has several answers."""
    return ["vqa_accuracy"] if all(len(answers) >= 4 for answers in references) else ["exact_match"]


def check_metrics(metrics: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    """`ValueError` if there is no such metric, or it does not fit the data."""
    for name in metrics:
        if name not in METRICS:
            raise ValueError(f'there is no metric "{name}", expected some of {", ".join(METRICS)}')
    fewest = min(map(len, references))
    if "vqa_accuracy" in metrics and fewest < 4:
        raise ValueError(
            f"vqa_accuracy compares an answer with those of several people, 4 or more a question, and a question has "
            f"{fewest}: exact_match fits these data"
        )
    if "cider" in metrics and len({tuple(answers) for answers in references}) < 2:
        raise ValueError(
            "cider weighs words by how few images have them, and all references are the same: rouge_l or exact_match "
            "fit these data"
        )
