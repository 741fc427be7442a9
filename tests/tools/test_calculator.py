"""The calculator against exact arithmetic, and against whatever a model may write."""

import builtins
import sys
import time
import warnings
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_hf.tools.calculator import MAX_SIZE, calculate


def joined(pair_and_sign):
    (left, a), sign, (right, b) = pair_and_sign
    if a is None or b is None or (sign in ("/", "//", "%") and b == 0):
        return f"({left}{sign}{right})", None
    value = {"+": a + b, "-": a - b, "*": a * b}.get(sign)
    if value is None:
        value = a / b if sign == "/" else Fraction(a // b) if sign == "//" else a % b
    return f"({left}{sign}{right})", value


numbers = st.integers(0, 99).map(lambda n: (str(n), Fraction(n)))
expressions = st.recursive(
    numbers, lambda e: st.tuples(e, st.sampled_from("+ - * / // %".split()), e).map(joined), max_leaves=6
)


@settings(max_examples=200, deadline=None)
@given(expressions)
def test_integers_are_exact_and_quotients_close(pair):
    expression, value = pair
    if value is None:
        assert calculate(expression) is None  # a division by zero somewhere
    elif "/" not in expression and "%" not in expression:
        assert calculate(expression) == (str(value) if abs(value) <= MAX_SIZE else None)
    elif "//" not in expression and "%" not in expression:  # these two jump where a float is off by its last bit
        found = calculate(expression)
        assert found is None or float(found) == pytest.approx(float(value), rel=1e-9, abs=1e-9)


@settings(max_examples=100, deadline=None)
@given(
    st.text(st.characters(exclude_characters="'\\\n\r\0", exclude_categories=["Cs"]), max_size=40),
    st.sampled_from("aeiou ß.é"),
)
def test_counts_letters(word, letter):
    assert calculate(f"'{word}'.count('{letter}')") == str(word.count(letter))


pieces = st.sampled_from(
    "0 1 9 99999 1e9 1e999 9999999999999999999 .5 5. 0x1F 1_0 e . , + - * ** / // % ( ) ' \" count .count( "
    "'aa'.count('a') "
    "and if else lambda [ ] { } : x _ \\ "
    "~ not < = ; # \n \t \0 \ud800 \u202e é 𝟗 ² ∞ import __import__('os') eval( open( f' b' 1j True None @ ->".split(
        " "
    )
)
inputs = st.one_of(
    st.lists(pieces, max_size=24).map("".join),
    st.text(max_size=60),
    st.tuples(
        st.sampled_from(["(", "-", "9*", "9**", "1+", "[", "'a'.count(", "{", "not "]),
        st.integers(0, 5000),
        st.sampled_from(["1", ")", ""]),
    ).map(lambda parts: parts[0] * parts[1] + parts[2]),
)


def never_raises_and_answers_short_and_at_once(expression):
    start, loaded = time.process_time(), set(sys.modules)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what Python thinks of the expression is not for the user's console
        result = calculate(expression)
    assert time.process_time() - start < 2  # 0.2 ms is usual
    assert set(sys.modules) == loaded
    assert result is None or (isinstance(result, str) and 0 < len(result) <= 30)


@settings(max_examples=2000, deadline=None)
@given(inputs)
def test_whatever_a_model_writes(expression):
    never_raises_and_answers_short_and_at_once(expression)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(20))  # hypothesis slows down within a long run
@settings(max_examples=5000, deadline=None, database=None)
@given(expression=inputs)
def test_whatever_a_model_writes_a_hundred_thousand_times(part, expression):
    never_raises_and_answers_short_and_at_once(expression)


@pytest.mark.parametrize(
    "expression",
    [
        "(" * 100 + "1" + ")" * 100,
        "(" * 10**6,
        "-" * 199 + "1",
        "9" * 10**6,
        "9*" * 99 + "9",
        "9**9**9**9",
        "1e999",
        "-1e999",
        "1e308*1e308",
        "1e999-1e999",
        "1/0",
        "1//0",
        "1%0",
        "1/0.0",
        "0.0//0",
        "1e-999/1e-999",
        "'" + "a" * 10**6 + "'.count('a')",
        "'a'.count('a'.count('a'))",
        "''.count.count('a')",
        "\0",
        "1\0+1",
        "'\0'.count('\0')",
        "\ud800",
        "'\ud800'.count('a')",
        "𝟗+",
        "²+1",
        "1" + "\u200b",
        "x" * 200,
        "[" * 200,
        "{" * 150 + "}" * 150,
        "lambda: " * 20,
        "1 if " * 30,
        "9" * 18 + "*" + "9" * 18,
        "0x" + "f" * 150,
        "0b" + "1" * 190,
        "9_" * 90 + "9",
        "1e18*1.1",
        "'a'.count(*'a')",
        "'a'.count(sub='a')",
        "''.join('a')",
        "'a'.count.__self__",
        "getattr('a','count')('a')",
        "().__class__",
        "'a'.count('a').real",
        "await 1",
        "yield",
        "print(1)",
        "exit()",
        "open('/etc/passwd')",
        "__import__('os').system('id')",
    ],
)
def test_expressions_that_mean_harm_give_nothing(expression, monkeypatch):
    def refuse(*arguments, **keywords):
        raise AssertionError("the calculator imported something")

    monkeypatch.setattr(builtins, "__import__", refuse)
    result = calculate(expression)
    assert result is None or (expression.strip("()-") == "1" and result in ("1", "-1")), expression[:40]


def test_edges_of_size_are_kept():
    assert calculate(str(MAX_SIZE)) == str(MAX_SIZE) and calculate(str(MAX_SIZE + 1)) is None
    assert calculate("'" + "a" * 180 + "'.count('a')") == "180" and calculate("1" * 19) is None
    assert (
        calculate("1e17*10") == "1000000000000000000"
        and calculate("0.0*-1") == "0"
        and calculate("0.1+0.2") == "0.30000000000000004"
    )


def test_nothing_but_arithmetic_and_count():
    for refused in (
        "2**3",
        "'a'*9",
        "'a'+'b'",
        "'a'.upper()",
        "'a'.count(1)",
        "'a'.count('a', 0)",
        "('a').count(x)",
        "len('a')",
        "abs(1)",
        "__import__('os').getcwd()",
        "(1).real",
        "x",
        "[1][0]",
        "1 if 1 else 2",
        "1<2",
        "not 1",
        "~1",
        "1j",
        "True",
        "None",
        "lambda: 1",
        "f'{1}'",
        "1;2",
        "a=1",
        "(a:=1)",
        "",
        " ",
        "()",
        "10**18*10",
        "9" * 19,
        "1e400",
        "1e400-1e400",
        "1/0",
        "1//0",
        "1%0",
        "\0",
        "(" * 199,
        "-" * 200 + "1",
    ):
        assert calculate(refused) is None, refused
    assert calculate("1,234*2") == "2468"  # the thousands' commas of GSM8K
    assert calculate("-7%3") == "2" and calculate(" 7//2 ") == "3" and calculate('"banana".count("an")') == "2"
