"""The contract suite: what every method promises, as tests that anybody's method can run.

A plug-in tests itself with ::

    import pytest
    from fusewright.testing import cases, check_property

    @pytest.mark.parametrize(("method", "property_"), cases([MyMethod]))
    def test_contract(method, property_):
        check_property(method, property_)

or, without pytest, ``check_method(MyMethod)``. A method that does not keep an identity names it
in ``card.exempt`` with the reason; the suite then demands a counterexample: it searches the
method's variants for one that breaks the identity, and fails if all keep it.

A :class:`~fusewright.methods.contract.Program` or :class:`~fusewright.methods.contract.Routed` is
run on a small network, with inputs of its experts' tasks if its card asks for data; parameters
called ``steps``, ``epochs``, ``batch`` or ``inputs`` are set small.

A ``reference``, a slow float64 function in plain NumPy, may be given to :func:`check_method` and
:func:`check_reference`: (method, base, experts, at) to the merged array.
"""

from fusewright.testing._promise import PROPERTIES, ContractViolation, Property
from fusewright.testing._reference import Reference, check_reference
from fusewright.testing._suite import cases, check_method, check_property
from fusewright.testing._toys import Toy, toy

__all__ = [
    "PROPERTIES", "ContractViolation", "Property", "Reference", "Toy", "cases",
    "check_method", "check_property", "check_reference", "toy",
]  # fmt: skip
