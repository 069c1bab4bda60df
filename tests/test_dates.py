"""Laws of the date data: one text is one date, splits share no date, and the renderings are CLDR's."""

import datetime
import importlib.resources
import json
import random
import re
from collections import Counter

import pytest

from transformer_jax.data import dates

GOLDEN = [
    ("en_US", "EEEE, MMMM d, y", "Thursday, April 2, 2020"),
    ("en_GB", "E, d MMM y", "Thu, 2 Apr 2020"),
    ("de", "EEEE, d. MMMM y", "Donnerstag, 2. April 2020"),
    ("fr", "d MMM y", "2 avr. 2020"),
    ("es", "EEEE, d 'de' MMMM 'de' y", "jueves, 2 de abril de 2020"),
    ("da", "EEEE 'den' d. MMMM y", "torsdag den 2. april 2020"),
    ("fi", "cccc d. MMMM y", "torstai 2. huhtikuuta 2020"),
    ("pl", "d MMMM y", "2 kwietnia 2020"),
    ("hu", "y. MMMM d., EEEE", "2020. április 2., csütörtök"),
    ("id", "EEEE, dd MMMM y", "Kamis, 02 April 2020"),
    ("vi", "d MMMM, y", "2 tháng 4, 2020"),
    ("ru", "d MMMM y\u202f'г'.", "2 апреля 2020\u202fг."),
    ("el", "d MMMM y", "2 Απριλίου 2020"),
    ("hi", "EEEE, d MMMM y", "गुरुवार, 2 अप्रैल 2020"),
    ("ja", "y/MM/dd", "2020/04/02"),
    ("zh", "y年M月d日EEEE", "2020年4月2日星期四"),
    ("ko", "y년 MMM d일 (E)", "2020년 4월 2일 (목)"),
]


def days_of(year: int) -> list[datetime.date]:
    """Returns every date of a year in order."""
    first = datetime.date(year, 1, 1).toordinal()
    return [datetime.date.fromordinal(first + i) for i in range(365 + (year % 4 == 0 and year != 1900))]


@pytest.mark.parametrize(("locale", "pattern", "text"), GOLDEN)
def test_golden_renderings(locale: str, pattern: str, text: str) -> None:
    assert pattern in dates.LOCALES[locale]["patterns"]
    assert dates.render(datetime.date(2020, 4, 2), locale, pattern) == text


def test_a_text_is_one_date_within_and_across_locales() -> None:
    found: dict[str, datetime.date] = {}
    for year in (1911, 2024):
        for locale, pattern in dates.FORMATS:
            texts = {dates.render(day, locale, pattern): day for day in days_of(year)}
            assert len(texts) == len(days_of(year)), (locale, pattern)
            for text, day in texts.items():
                assert found.setdefault(text, day) == day, (text, locale, pattern)


def test_every_text_shows_the_year_and_the_day_as_numbers() -> None:
    for locale, pattern in dates.FORMATS:
        for day in days_of(2020)[::29]:
            numbers = re.findall(r"\d+", dates.render(day, locale, pattern))
            assert {"2020", str(day.day)} <= {number.lstrip("0") for number in numbers}, (locale, pattern)


def test_no_pattern_is_ambiguous_about_day_and_month() -> None:
    for locale, pattern in dates.FORMATS:
        fields = re.sub(r"'[^']*'", "", pattern)
        assert not re.search(r"(?<!y)yy(?!y)", fields), (locale, pattern)
        assert re.search(r"MMM|LLL|y.*M.*d", fields), (locale, pattern)


def test_splits_are_disjoint_by_date_and_complete() -> None:
    owned = {split: [iso for _, iso in dates.pairs(split)] for split in dates.SPLITS}
    everything = Counter(iso for isos in owned.values() for iso in isos)
    calendar = [day.isoformat() for year in range(1900, 2100) for day in days_of(year)]
    assert everything == Counter(calendar)
    for split, share in (("train", 0.8), ("validation", 0.1), ("test", 0.1)):
        assert abs(len(owned[split]) / len(calendar) - share) < 0.005


def test_the_same_seed_gives_the_same_pairs_and_count_their_beginning() -> None:
    whole = dates.pairs("validation", seed=3)
    assert whole == dates.pairs("validation", seed=3)
    assert whole[:50] == dates.pairs("validation", 50, seed=3)
    other = dates.pairs("validation", seed=4)
    assert whole != other
    assert {iso for _, iso in whole} == {iso for _, iso in other}


def test_the_pairs_are_the_published_ones() -> None:
    """A change here changes the dataset: every published score on it is then void."""
    assert dates.pairs("train", 2) == [("2064年1月24日星期四", "2064-01-24"), ("24 Maret 2018", "2018-03-24")]
    assert dates.pairs("validation", 1) == [("st 21. listopadu 2063", "2063-11-21")]
    assert dates.pairs("test", 1) == [("zondag 9 juni 2058", "2058-06-09")]


def test_sources_render_their_date_and_every_format_is_drawn() -> None:
    drawn: set[tuple[str, str]] = set()
    for text, iso in dates.pairs("train", 1500):
        day = datetime.date.fromisoformat(iso)
        found = {form for form in dates.FORMATS if dates.render(day, *form) == text}
        assert found, (text, iso)
        drawn |= found
    assert drawn == set(dates.FORMATS)


def test_errors_name_what_is_wrong_and_what_is_possible() -> None:
    day = datetime.date(2020, 4, 2)
    with pytest.raises(ValueError, match=r"'dev'.*train, validation, test"):
        dates.pairs("dev")
    with pytest.raises(ValueError, match="-1"):
        dates.pairs("train", -1)
    with pytest.raises(ValueError, match=r"'xx'.*en_US"):
        dates.render(day, "xx", "d MMM y")
    with pytest.raises(ValueError, match="'yy'"):
        dates.render(day, "en_US", "d MMM yy")


def test_quotes_are_literals() -> None:
    assert dates.render(datetime.date(2020, 4, 2), "en_US", "d 'of' MMMM ''y") == "2 of April '2020"


@pytest.mark.parametrize("pattern", dates.LOCALES["en_US"]["patterns"])
def test_baseline_reads_american_dates(pattern: str) -> None:
    for day in days_of(1999):
        assert dates.baseline(dates.render(day, "en_US", pattern)) == day.isoformat()


def test_baseline_leaves_room_and_always_answers() -> None:
    found = dates.pairs("validation")
    score = sum(dates.baseline(text) == iso for text, iso in found) / len(found)
    assert 0.05 < score < 0.7
    assert dates.baseline("") == "2000-01-01"


def test_renderings_are_those_of_babel() -> None:
    babel = pytest.importorskip("babel", reason="Babel is needed only to check the frozen table")
    from babel.dates import format_date

    table = json.loads(importlib.resources.files("transformer_jax.data").joinpath("dates.json").read_text("utf-8"))
    frozen = table["source"]["cldr"]
    # A Babel too old to tell its CLDR version cannot be compared.
    told = babel.core.get_cldr_version() if hasattr(babel.core, "get_cldr_version") else "of an unknown version"
    if told != frozen:
        pytest.skip(f"the table holds CLDR {frozen}, the installed Babel CLDR {told}")
    draw = random.Random(0)
    sample = [draw.choice(days_of(draw.randint(1900, 2099))) for _ in range(50)]
    for locale, pattern in dates.FORMATS:
        for day in sample:
            assert dates.render(day, locale, pattern) == format_date(day, pattern, locale=locale)
