"""What the tests of MLflow share: a small run, and what the store of this folder has."""

import contextlib
import sqlite3

from fedlq_ray import simulate
from fedlq_ray.config.load import load

QUICK = ["rounds=3", "clients.hosting=serial", "clients.count=8", "clients.cohort=4", "tracking.log_model=false"]


def run(*overrides):
    return simulate(load(None, [*QUICK, *overrides]))


def rows(query):
    with contextlib.closing(sqlite3.connect("mlflow.db")) as database:
        return database.execute(query).fetchall()
