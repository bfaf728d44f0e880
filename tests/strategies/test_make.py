"""What `make` gives a strategy: error feedback by its class, by the configuration, or by what its payload needs."""

from fedlq_ray.config.schemes import strategy_config
from fedlq_ray.models import Layer
from fedlq_ray.strategies import Member, StrategyContext, make
from fedlq_ray.strategies.kimad import Kimad

LAYERS = (Layer("a", 0, 100), Layer("b", 100, 500))


def context(name="own:any", **config):
    return StrategyContext(strategy_config(name=name, **config), LAYERS, seed=0)


def cohort():
    return [Member(client, 10, 1.0, 1000.0 * (client + 1)) for client in range(3)]


def test_fedlq_rd_feeds_errors_back_where_models_are_sent():
    for payload, asked, due in (("update", None, False), ("model", None, True), ("model", False, False)):
        made = make(context(name="fedlq_rd", payload=payload, error_feedback=asked))
        assert made.plan(made.init(), 0, cohort())[0].error_feedback == due


def test_a_function_that_makes_a_strategy_has_its_class_error_feedback_unless_one_is_set():
    from fedlq_ray.strategies.fedlq_rd import FedLQRD

    class Feeding(FedLQRD):
        error_feedback = True

    for given in (Feeding, lambda context: Feeding(context)):
        for asked, due in ((None, True), (False, False), ("ef21", "ef21")):
            made = make(context(error_feedback=asked), given)
            plan = made.plan(made.init(), 0, cohort())[0]
            assert plan.error_feedback == due
    plain = make(context(), lambda context: Kimad(context)).plan(None, 0, cohort())[0]
    assert plain.error_feedback is False
