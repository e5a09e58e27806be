"""Stand-ins for the packages `wandb` and `trackio` that record calls, with the rules of the real ones."""

import os
import types


class FakeRun:
    """A run of a tracker: what it was started with, each time, and what it got."""

    def __init__(self):
        self.starts, self.modes, self.entries = [], [], []
        self.is_open = False
        self.step = -1

    def begin(self, arguments):
        assert not self.is_open, "started twice without an end"
        assert arguments["resume"] == "allow"
        self.is_open = True
        self.starts.append(arguments)
        self.modes.append(os.environ.get("WANDB_MODE"))

    def log(self, data, step):
        assert self.is_open
        assert step >= self.step, f"step {step} after {self.step} would be dropped"
        self.step = step
        self.entries += [(step, name, value) for name, value in data.items()]

    def finish(self):
        assert self.is_open
        self.is_open = False

    def killed(self):
        """The process that logged is gone."""
        self.is_open = False

    def numbers(self):
        """All logged numbers, without the texts."""
        return sorted(entry for entry in self.entries if not isinstance(entry[2], str))

    def texts(self):
        return [entry for entry in self.entries if isinstance(entry[2], str)]


class FakeWandb(types.ModuleType):
    """Runs are known by their id."""

    def __init__(self):
        super().__init__("wandb")
        self.runs = {}

    def init(self, *, project, name, id, resume, config, dir):
        run = self.runs.setdefault(id, FakeRun())
        run.begin({"project": project, "name": name, "resume": resume, "config": config, "dir": dir})
        return run


class FakeTrackio(types.ModuleType):
    """Runs are known by their name; functions of the module belong to the current run. It prints to stdout."""

    def __init__(self):
        super().__init__("trackio")
        self.runs = {}
        self.current = None

    def init(self, *, project, name, config, resume):
        print(f"* Trackio project initialized: {project}")
        self.current = self.runs.setdefault(name, FakeRun())
        self.current.begin({"project": project, "name": name, "resume": resume, "config": config})

    def log(self, metrics, *, step):
        self.current.log(metrics, step)

    def finish(self):
        print("* Run finished.")
        self.current.finish()
