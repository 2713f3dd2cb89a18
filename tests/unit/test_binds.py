"""When a volume has lost its last bind."""

from pathlib import Path

from cachefs.binds import Lifetimes

HERE = [Path("/a")]


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_volume_goes_with_its_last_bind() -> None:
    lifetimes = Lifetimes(Clock(), 30)
    lifetimes.expect("v")
    assert lifetimes.update({}, ["v"]) == []
    assert lifetimes.expecting
    assert lifetimes.update({"v": HERE}, ["v"]) == []
    assert not lifetimes.expecting
    assert lifetimes.update({}, ["v"]) == ["v"]


def test_a_bind_that_never_comes_is_awaited_for_a_while() -> None:
    clock = Clock()
    lifetimes = Lifetimes(clock, 30)
    lifetimes.expect("v")
    clock.now += 29
    assert lifetimes.update({}, ["v"]) == []
    clock.now += 2
    assert lifetimes.update({}, ["v"]) == ["v"]


def test_a_second_bind_is_awaited_though_the_first_one_goes() -> None:
    lifetimes = Lifetimes(Clock(), 30)
    assert lifetimes.update({"v": HERE}, ["v"]) == []
    lifetimes.expect("v", bound=1)
    assert lifetimes.update({"v": HERE}, ["v"]) == []
    assert lifetimes.expecting
    assert lifetimes.update({}, ["v"]) == []
    assert lifetimes.update({"v": HERE}, ["v"]) == []


def test_an_old_expectation_does_not_hold_a_volume_that_comes_again() -> None:
    lifetimes = Lifetimes(Clock(), 30)
    lifetimes.expect("v", bound=1)
    lifetimes.removed("v")
    assert lifetimes.update({}, ["v"]) == ["v"]
