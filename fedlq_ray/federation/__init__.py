"""The simulated world: clients, links, cohorts, rounds. It knows no Ray, no files and no MLflow."""
