"""The data of a scheme in an exported model; test_modeling_eabf_llama.py tests what is computed from it."""

from pathlib import Path

import pytest
from scheme_cases import SHARP

from eabf_jax.errors import InputError
from eabf_jax.rope import Scheme, import_schemes, scheme
from eabf_jax.rope.exported import check_exported, exported_data


def test_exported_data_of_another_scheme_are_refused(user_schemes: Path) -> None:
    """A function has changed since the export, so the tables in the file differ from what it computes."""
    import_schemes(str(user_schemes))
    sizes = (16, 3, 64)
    for s in (Scheme.from_dict(SHARP), scheme("widening", pretrained_window=16), scheme("eabf", pretrained_window=16)):
        data = exported_data(s, *sizes)
        check_exported(data, s, *sizes)
        for part, key in (("frequencies", "table"), ("frequencies", "inverse_frequencies"), ("logit_scale", "table")):
            if key in data[part]:
                changed = {**data, part: {**data[part], key: data[part][key][:-1]}}
                with pytest.raises(InputError, match=f"'{part}' in eabf_rotary is not what the scheme"):
                    check_exported(changed, s, *sizes)
        with pytest.raises(InputError, match="'scheme' in eabf_rotary is not what the scheme"):
            check_exported({}, s, *sizes)
    with pytest.raises(InputError, match="'logit_scale' in eabf_rotary"):
        check_exported(data | {"logit_scale": data["logit_scale"] | {"pretrained_window": 17}}, s, *sizes)
