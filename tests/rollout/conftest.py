import pytest
from rollouts import MODEL, VOCABULARY

from megatron_safe.models.roles import Role


@pytest.fixture(scope="module")
def make_actor(runtime):
    made = {}

    def make(model=MODEL, precision="fp32") -> Role:
        key = (str(model), precision)
        if key not in made:
            made[key] = Role("actor", model, runtime, VOCABULARY, precision, seed=2)
        return made[key]

    return make
