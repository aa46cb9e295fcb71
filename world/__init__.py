"""How the embedded base model was made: sources, sprites, scenes, trainings, grading, export.

Maintainers run this (`dvc repro world/dvc.yaml`, or the modules one by one as `python -m world.scenes` ...); users of
the project never need it, the result lies in `data/`.
"""
