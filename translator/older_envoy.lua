-- Stands behind llm_provider.lua for an Envoy that is older than what that script uses. In front of this text
-- there are two locals, CONTEXT (the filter_context) and FILTER_STATE (the namespace of dynamic metadata that
-- stand in for filter state, or nil where filter state can be set). Such an Envoy has a VM for each filter
-- configuration, so the methods of its objects can be replaced for this one provider.

local provider_request = envoy_on_request
local prepared = false

local REQUEST_LENGTH = "llm.request_length"

local function prepare(h)
  local handle, info = getmetatable(h), getmetatable(h:streamInfo())
  function CONTEXT:get(key) return self[key] end
  function handle.filterContext() return CONTEXT end
  -- The script asks for the length of the request only.
  function handle.requestHeaders(response)
    local length = response:streamInfo():filterState():get(REQUEST_LENGTH)
    return { get = function() return length end }
  end
  if not FILTER_STATE then return end
  local state = {}
  state.__index = state
  function state:get(key) return (self.info:dynamicMetadata():get(FILTER_STATE) or {})[key] end
  function state:set(key, _, value) self.info:dynamicMetadata():set(FILTER_STATE, key, value) end
  function info.filterState(stream_info) return setmetatable({ info = stream_info }, state) end
end

local function note_length(h)
  local length = h:headers():get("content-length")
  h:streamInfo():filterState():set(REQUEST_LENGTH, "envoy.string", length or "0")
end

-- Without the preparation the script has no data: it answers 500.
function envoy_on_request(h)
  if not prepared then
    pcall(prepare, h)
    prepared = true
  end
  provider_request(h) -- does not come back when it answered itself
  pcall(note_length, h)
end
for _, f in ipairs({ envoy_on_request, note_length }) do jit.off(f) end
