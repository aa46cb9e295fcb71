"""A campaign of mistakes, hostile inputs, kills and full disks against a clone of this project.

`python -m tests.campaign` runs all of it; `tests/test_campaign.py` runs a part in `make test`. A case is data: what is
done, what the one line must name, and the exit status. Each runs in a process of its own with a time limit.
"""
