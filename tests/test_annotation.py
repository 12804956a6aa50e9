"""Test what annotation costs."""

import pytest

from diclip.annotation import affordable, minutes


def test_minutes_by_hand():
    assert minutes("tags", 400) == pytest.approx(133.33, abs=0.01)
    assert minutes("masks", 1464) / 60 == pytest.approx(97.5, abs=0.1)  # hours for VOC's train
    with pytest.raises(ValueError, match="kind of annotation is 'boxes', expected one of tags, points"):
        minutes("boxes", 1)


@pytest.mark.parametrize("kind", ["tags", "points", "scribbles", "masks"])
def test_what_time_pays_for_is_as_much_as_fits(kind):
    for images in (0, 1, 33, 400):
        assert affordable(kind, minutes(kind, images)) == images
    number = affordable(kind, 100)
    assert minutes(kind, number) <= 100 < minutes(kind, number + 1)


def test_equal_minutes():
    assert affordable("masks", minutes("tags", 400)) == 33
