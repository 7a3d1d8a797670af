"""Mixins give what the callbacks give."""

import pytest
from fits import Classifier, same, train
from lightning import Callback

import lightning_dropreg as dr
from lightning_dropreg.errors import InvalidArgumentError
from lightning_dropreg.mixins import without_mixins

MIXINS = {
    dr.ExplicitPenaltyMixin: dr.ExplicitPenalty,
    dr.ImplicitNoiseMixin: dr.ImplicitNoise,
    dr.MiniBatchDropoutMixin: dr.MiniBatchDropout,
}


@pytest.mark.parametrize(
    "mixins",
    [
        (dr.ExplicitPenaltyMixin,),
        (dr.ImplicitNoiseMixin,),
        (dr.MiniBatchDropoutMixin,),
        (dr.ExplicitPenaltyMixin, dr.ImplicitNoiseMixin),
        (dr.MiniBatchDropoutMixin, dr.ImplicitNoiseMixin),
    ],
)
@pytest.mark.parametrize("last", [False, True], ids=["mixins first", "module first"])
def test_mixins_give_the_gradients_of_the_callbacks(mixins, last):
    bases = (Classifier, *mixins) if last else (*mixins, Classifier)
    made = type("Mixed", bases, {"explicit_penalty": {"strength": 2.0}, "minibatch_dropout": {"k": 3}})
    options = {dr.ExplicitPenalty: {"strength": 2.0}, dr.MiniBatchDropout: {"k": 3}, dr.ImplicitNoise: {}}
    callbacks = [MIXINS[mixin](**options[MIXINS[mixin]]) for mixin in mixins]
    mixed = train(make=made)
    assert same(mixed, train(callbacks))
    assert not same(mixed, train())


def test_mixin_keeps_the_users_callbacks_and_options():
    class Mixed(dr.ImplicitNoiseMixin, Classifier):
        def __init__(self):
            super().__init__()
            self.implicit_noise = {"strength": 0.25}

        def configure_callbacks(self):
            return [dr.ExplicitPenalty()]

    found = Mixed().configure_callbacks()
    assert [type(callback).__name__ for callback in found] == ["ExplicitPenalty", "ImplicitNoise"]
    assert found[1].noise.strength == 0.25


def test_mixin_option_that_is_misspelt():
    class Misspelt(dr.ExplicitPenaltyMixin, Classifier):
        explicit_penalty = {"strenght": 2.0}  # noqa: RUF012

    with pytest.raises(InvalidArgumentError, match=r"Misspelt.explicit_penalty.*'strength'"):
        train(make=Misspelt)


def test_mixin_and_callback_of_one_kind_are_refused():
    class Mixed(dr.ImplicitNoiseMixin, Classifier):
        pass

    with pytest.raises(dr.errors.CompositionError, match="mixin"):
        train([dr.ImplicitNoise()], make=Mixed)


def test_without_mixins_a_module_brings_no_regularizers():
    class Mixed(dr.ExplicitPenaltyMixin, Classifier):
        _bare = False  # a name of the user's own

    class Own(Classifier):
        def configure_callbacks(self):
            return [Plain(), dr.ImplicitNoise()]

    class Plain(Callback):
        pass

    mixed, own = Mixed(), Own()
    with without_mixins(mixed), without_mixins(own):
        assert [type(callback) for callback in own.configure_callbacks()] == [Plain]
    with without_mixins(mixed):
        assert mixed.configure_callbacks() == []
        assert len(Mixed().configure_callbacks()) == 1
    assert len(mixed.configure_callbacks()) == 1
    assert len(own.configure_callbacks()) == 2
    assert "configure_callbacks" not in vars(own)
