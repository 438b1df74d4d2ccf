"""Another scheduler is chosen by name and keeps the model's own betas; a name that is none says what is near."""

from __future__ import annotations

import pytest
from diffusers import DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler

from export.denoiser import MARKERS, PREDICTS_V
from export.errors import ExportError
from export.scheduler import believed, choose_scheduler

OWN = PNDMScheduler(beta_end=0.0123, prediction_type="v_prediction")


@pytest.mark.parametrize("name", ["EulerDiscrete", "EulerDiscreteScheduler"])
def test_the_models_own_config_is_kept_and_the_changes_are_made(name: str) -> None:
    changes = "timestep_spacing=trailing,use_karras_sigmas=true,steps_offset=1,sigma_min=0.5"
    chosen = choose_scheduler(OWN, f"{name}:{changes}")
    assert type(chosen) is EulerDiscreteScheduler
    config = chosen.config
    assert (config.beta_end, config.prediction_type) == (0.0123, "v_prediction")
    assert (config.timestep_spacing, config.use_karras_sigmas) == ("trailing", True)
    assert (config.steps_offset, config.sigma_min) == (1, 0.5)


@pytest.mark.parametrize("spectrum", ["linear", '"linear"'])
def test_a_value_may_be_a_list(spectrum: str) -> None:
    """Commas in brackets or quotes part no changes."""
    chosen = choose_scheduler(
        OWN, f"UniPCMultistep:disable_corrector=[0,1],beta_schedule={spectrum},solver_order=3"
    )
    assert (chosen.config.disable_corrector, chosen.config.solver_order) == ([0, 1], 3)
    assert chosen.config.beta_schedule == "linear"
    with pytest.raises(ExportError, match="steep,steeper"):
        choose_scheduler(OWN, 'UniPCMultistep:beta_schedule="steep,steeper"')


def test_values_may_be_written_as_python_writes_them() -> None:
    config = choose_scheduler(OWN, "EulerDiscrete:use_karras_sigmas=True,sigma_min=None").config
    assert (config.use_karras_sigmas, config.sigma_min) == (True, None)


def test_what_a_scheduler_needs_and_the_config_lacks_may_be_named() -> None:
    assert choose_scheduler(OWN, "Amused:mask_token_id=7").config.mask_token_id == 7


def test_a_models_scheduler_gives_way_only_where_it_cannot_say_what_the_file_says() -> None:
    own = PNDMScheduler(beta_end=0.0123)
    assert believed(own, ()) is own
    for markers, kind in (((PREDICTS_V,), PNDMScheduler), (MARKERS, DDIMScheduler)):
        scheduler = believed(own, markers)
        assert type(scheduler) is kind
        assert (scheduler.config.prediction_type, scheduler.config.beta_end) == ("v_prediction", 0.0123)


def test_what_a_scheduler_takes_besides_its_own_keys_need_not_be_in_the_config() -> None:
    assert choose_scheduler(OWN, "DDIMInverse").config.beta_end == 0.0123  # it has **kwargs


@pytest.mark.parametrize(
    ("wanted", "why"),
    [
        ("EulerDiscret", "did you mean .*EulerDiscreteScheduler"),
        ("", "^'' names no scheduler: write NAME or NAME:KEY=VALUE"),
        (":clip_sample=false", "^':clip_sample=false' names no scheduler"),
        ("StableDiffusionPipeline", "no scheduler"),
        ("EulerDiscrete:karras=true", "takes no karras; it takes .*use_karras_sigmas"),
        ("EulerDiscrete:use_karras_sigmas", "write EulerDiscrete:KEY=VALUE"),
        (
            "EulerDiscrete:beta_schedule=steep",
            "cannot be made .*; name another, or other values after its name$",
        ),
        ("DDIM:rescale_betas_zero_snr=no", "rescale_betas_zero_snr takes true or false, not 'no'"),
        ("DDIM:set_alpha_to_one=FALSE", "takes true or false, not 'FALSE'"),
        ("DDIM:clip_sample=0", "takes true or false, not '0'"),
        ("DDIM:num_train_timesteps=abc", r"^DDIMScheduler cannot be made from the model's config: .*$"),
        (
            "Amused",
            "^AmusedScheduler is for other models: their config names mask_token_id, this one's does not; ",
        ),
        ("FlaxDDIM", "^FlaxDDIMScheduler requires the FLAX library"),
        ("FlaxDDI", r"did you mean (?!.*Flax)"),
    ],
)
def test_what_is_no_scheduler_or_no_change_of_one_is_refused(wanted: str, why: str) -> None:
    with pytest.raises(ExportError, match=why) as refused:
        choose_scheduler(OWN, wanted)
    assert "\n" not in str(refused.value)
