"""Learning a tuner: objective, trajectory of the model meanwhile, task pool, validation, Lightning shell."""
