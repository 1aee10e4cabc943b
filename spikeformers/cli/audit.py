"""`audit`: every product of a run, a saved model or a named model, and whether spikes drive it."""

from jsonargparse import Namespace

from spikeformers.cli.energy import energy_subject


def audit_model(arguments: Namespace) -> None:
    """The products of a model, what merging changes, and the papers' verdict."""
    from spikeformers import deploy

    model, images, note = energy_subject(arguments.model, arguments.images)
    found = deploy.audit(deploy.fuse(model) if arguments.merged else model, images)
    print(f"{note}; merged by fuse" if arguments.merged else note)
    print(found.table())
    if arguments.json:
        print(f"written: {found.save(arguments.json)}")
