"""Operators that are made of others, looked up once.

Each time that a program is decomposed, torch looks for these operators in every namespace, and for
each of 27 namespaces it first looks up all those that C++ has registered. Where a tiny program is
lowered, that takes a twelfth of the time.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch._export import utils


@contextmanager
def composite_operators_once() -> Iterator[None]:
    """Within this they are looked up again only when others are registered."""
    look_up, known = utils._materialize_cpp_cia_ops, None

    def look_up_if_new() -> None:
        nonlocal known
        names = torch._C._dispatch_get_registrations_for_dispatch_key("CompositeImplicitAutograd")
        if names != known:
            look_up()
            known = names

    with mock.patch.object(utils, "_materialize_cpp_cia_ops", look_up_if_new):
        yield
