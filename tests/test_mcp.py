"""Tools of a real MCP server over stdio: that of the `mcp` package, as its client shows them."""

import sys
from contextlib import asynccontextmanager

import pytest
from anyio.from_thread import start_blocking_portal

import lmopt
from lmopt import Tool

mcp = pytest.importorskip("mcp", reason="the package mcp is not installed")

SERVER = '''
from inspect import Parameter, Signature
from typing import Annotated

from mcp.types import CallToolResult
from pydantic import BaseModel, Field

try:
    from mcp.server.mcpserver import Image, MCPServer
    from mcp.server.mcpserver.exceptions import ToolError
except ImportError:  # before mcp 2
    from mcp.server.fastmcp import FastMCP as MCPServer, Image
    from mcp.server.fastmcp.exceptions import ToolError


class Address(BaseModel):
    street: str
    number: int | None = None


class Guest(BaseModel):
    name: str
    home: Address
    stays: list[Address] = []


server = MCPServer("inn")


@server.tool()
def book(
    guest: Guest,
    nights: Annotated[int, Field(ge=1, description="how long")] = 1,
    room: Address | str | None = None,
) -> str:
    """Book a room."""
    return f"{guest.name} of {guest.home.street} for {nights}"


def find(**given):
    """Find documents."""
    return str(given)


named = [("query", str, Parameter.empty), ("n", Annotated[int, Field(alias="max-results")], 5)]
find.__signature__ = Signature(
    [Parameter(n, Parameter.KEYWORD_ONLY, annotation=t, default=d) for n, t, d in named]
)
server.tool()(find)


@server.tool()
def teas(n: int) -> list[str]:
    return ["green tea", "black tea"][:n]


@server.tool()
def draw(text: str) -> Image:
    return Image(data=text.encode(), format="png")


@server.tool()
def count(text: str) -> CallToolResult:
    return CallToolResult(content=[], structuredContent={"letters": len(text)})


@server.tool()
def spill(what: str) -> str:
    raise ToolError(f"no {what} is left")


server.run()
'''


@pytest.fixture(scope="module")
def portal():
    with start_blocking_portal() as made:
        yield made


@pytest.fixture(scope="module")
def session(portal, tmp_path_factory):
    """A session with the server, in the loop of the portal."""
    folder = tmp_path_factory.mktemp("mcp")
    folder.joinpath("server.py").write_text(SERVER)

    @asynccontextmanager
    async def connected():
        told = mcp.StdioServerParameters(command=sys.executable, args=[str(folder / "server.py")])
        with folder.joinpath("log").open("w") as log:
            async with (
                mcp.stdio_client(told, errlog=log) as streams,
                mcp.ClientSession(*streams) as made,
            ):
                await made.initialize()
                yield made

    with portal.wrap_async_context_manager(connected()) as made:
        yield made


@pytest.fixture(scope="module")
def listed(portal, session):
    return portal.call(session.list_tools).tools


@pytest.fixture
def tools(portal, session, listed):
    """By name, called from outside of the loop."""

    def call(name, arguments):
        return portal.call(session.call_tool, name, arguments)

    return {one.name: Tool.from_mcp(one, call) for one in listed}


def test_a_tool_has_the_parameters_that_the_server_names(tools, listed):
    assert list(tools) == ["book", "find", "teas", "draw", "count", "spill"]
    book = tools["book"]
    assert (book.name, book.desc) == ("book", "Book a room.")
    assert [(one.name, one.required, one.desc) for one in book.fields] == [
        ("guest", True, ""),
        ("nights", False, "how long"),
        ("room", False, ""),
    ]
    for by_alias in (True, False):
        made = Tool.from_mcp(listed[0].model_dump(by_alias=by_alias), book.function)
        assert made == book
        assert [one.words for one in made.fields] == [one.words for one in book.fields]


def test_nested_schemas_are_described_in_words(tools):
    guest, nights, room = (one.words for one in tools["book"].fields)
    for name in ("name", "home", "street", "number", "stays"):
        assert f"{name}: " in guest
    assert "int" in nights and "street: " in room and "str" in room and "null" in room
    assert not any("any" in words for words in (guest, nights, room))


def test_a_property_that_is_no_identifier_is_an_argument_and_mapped_back(tools):
    find = tools["find"]
    assert [one.name for one in find.fields] == ["query", "max_results"]
    assert find(query="tea", max_results=3) == "{'query': 'tea', 'max-results': 3}"
    assert find(query="tea") == "{'query': 'tea', 'max-results': 5}"
    told = dict(zip(find.schema["properties"], ["tea", 3], strict=True))
    assert find(**told) == "{'query': 'tea', 'max-results': 3}"


def test_the_outcome_of_a_call_is_its_text(tools):
    guest = {"name": "Ada", "home": {"street": "Mill Lane"}}
    assert tools["book"](guest=guest, nights=2) == "Ada of Mill Lane for 2"
    assert tools["teas"](n=1) == "green tea"
    assert tools["teas"](n=2).split() == ["green", "tea", "black", "tea"]


def test_an_image_and_structured_content_are_kept(tools):
    assert tools["draw"](text="PNG") == lmopt.Image("data:image/png;base64,UE5H")
    assert lmopt.as_text(tools["count"](text="tea")) == '{"letters": 3}'


def test_a_call_that_fails_raises_what_the_server_says(tools):
    with pytest.raises(Exception, match="no tea is left"):
        tools["spill"](what="tea")


def test_an_agent_calls_the_tools_of_a_session_in_its_loop(portal, session, listed):
    agent = lmopt.react("question -> answer", [Tool.from_mcp(t, session.call_tool) for t in listed])
    calls = [
        ("find", {"query": "tea", "max_results": 2}),
        ("book", {"guest": {"name": "Ada", "home": {"street": "Mill Lane"}}}),
        ("spill", {"what": "tea"}),
        ("spill", {}),
        ("finish", {}),
    ]
    replies = [{"thought": "", "tool": name, "arguments": given} for name, given in calls]
    lm = lmopt.scripted_lm([*replies, {"reasoning": "", "answer": "None."}])
    made = portal.call(lmopt.arun, agent, lm, {"question": "Is there tea?"})
    found, booked, spilt, wrong, _ = (turn.observation for turn in made.trajectory)
    assert made.answer == "None."
    assert found == "{'query': 'tea', 'max-results': 2}"
    assert booked == "Ada of Mill Lane for 1"
    assert spilt.startswith("The tool failed: ") and "no tea is left" in spilt
    assert wrong.startswith("Wrong arguments: spill lacks the argument 'what'")
