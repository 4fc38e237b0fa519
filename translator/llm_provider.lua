-- What Envoy does for an LLM provider, an *upstream* HTTP filter of its cluster: prepare the request, and read
-- the tokens that the response reports. It runs again for each attempt, on the client's own body: what a retry
-- sends to another provider is made here anew, from that provider's data.
--
-- The data are the filter's `filter_context`; translator/lua.py makes it and documents it:
--   {id, host, data: prefix <US> models <US> max_bytes or none, and for each operation
--     <RS> METHOD suffix [path], then, if the body is spliced, <US>, and for each member
--       mode <US> JSON text <US> key <US> inner key or none <US>}
--   <RS> and <US> are the bytes 30 and 31, which no JSON text has; keys are JSON texts, too. It is one text because
--   Envoy copies the filter_context for each request.
--
-- The body is not decoded. Its bytes are checked against the JSON grammar in one pass, in which the places of
-- the configured members are found; only these bytes change, so big integers, number formats, key order and
-- white space stay.
--
-- About ffi: the pass reads the body through a raw pointer, in loops that LuaJIT compiles. That is safe
-- because a Lua string always ends in a NUL byte, which no loop passes: no JSON token holds a NUL, so the NUL
-- is the end of every loop. There is no second scanner for a Lua without ffi: there this file does not load
-- and Envoy refuses the cluster (a NACK that says why), which is safer than a rarely used copy of a security
-- check.

local ffi = require("ffi")
local BYTES = ffi.typeof("const uint8_t *")
local byte, find, gmatch, match, sub = string.byte, string.find, string.gmatch, string.match, string.sub
local concat = table.concat
local band, bor, lshift, rshift = bit.band, bit.bor, bit.lshift, bit.rshift

-- --------------------------------------------------------------------------------------------------
-- JSON

local MAX_DEPTH = 512 -- arrays and objects open at once, the body's own object included

-- What a byte is: 0 or, where it belongs to the class, 1.
local SPECIAL = ffi.new("uint8_t[256]") -- not simply a character of a string: quote, backslash, control, NUL
local SPACE = ffi.new("uint8_t[256]")
local DIGIT = ffi.new("uint8_t[256]")
local HEX = ffi.new("uint8_t[256]")
local ESCAPE = ffi.new("uint8_t[256]") -- behind a backslash: 1 complete, 2 four hexadecimal digits follow
for c = 0, 31 do SPECIAL[c] = 1 end
for c in ('"\\'):gmatch(".") do SPECIAL[byte(c)] = 1 end
for c in (" \t\n\r"):gmatch(".") do SPACE[byte(c)] = 1 end
for c in ("0123456789"):gmatch(".") do DIGIT[byte(c)] = 1 end
for c in ("0123456789abcdefABCDEF"):gmatch(".") do HEX[byte(c)] = 1 end
for c in ('"\\/bfnrt'):gmatch(".") do ESCAPE[byte(c)] = 1 end
ESCAPE[byte("u")] = 2

local QUOTE, BACKSLASH, COMMA, COLON = byte('"'), byte("\\"), byte(","), byte(":")
local OBJECT, OBJECT_END, ARRAY = byte("{"), byte("}"), byte("[")
local MINUS, PLUS, DOT, ZERO = byte("-"), byte("+"), byte("."), byte("0")

-- All positions count from 0. Each *_end function gets the position where a thing begins and returns the one
-- behind it; a fault at position i is returned as -1 - i.

local function skip_space(p, i)
  while SPACE[p[i]] ~= 0 do i = i + 1 end
  return i
end

local last_four = 0 -- the last position that four bytes of the body can be read from

-- i: behind the opening quote, or anywhere in the string
local function string_end(p, i)
  while true do
    -- four at a time: 35 instead of 88 us for 100 KB of plain text, and no loss where escapes are dense
    while i <= last_four and SPECIAL[p[i]] + SPECIAL[p[i + 1]] + SPECIAL[p[i + 2]] + SPECIAL[p[i + 3]] == 0 do
      i = i + 4
    end
    while SPECIAL[p[i]] == 0 do i = i + 1 end
    local c = p[i]
    if c == QUOTE then return i + 1 end
    if c ~= BACKSLASH then return -1 - i end
    local kind = ESCAPE[p[i + 1]]
    if kind == 1 then
      i = i + 2
    elseif
      kind == 2 and HEX[p[i + 2]] ~= 0 and HEX[p[i + 3]] ~= 0 and HEX[p[i + 4]] ~= 0 and HEX[p[i + 5]] ~= 0
    then
      i = i + 6
    else
      return -1 - i
    end
  end
end

local function number_end(p, i)
  if p[i] == MINUS then i = i + 1 end
  if p[i] == ZERO then
    i = i + 1
  else
    if DIGIT[p[i]] == 0 then return -1 - i end
    while DIGIT[p[i]] ~= 0 do i = i + 1 end
  end
  if p[i] == DOT then
    i = i + 1
    if DIGIT[p[i]] == 0 then return -1 - i end
    while DIGIT[p[i]] ~= 0 do i = i + 1 end
  end
  if p[i] == 101 or p[i] == 69 then -- e, E
    i = i + 1
    if p[i] == PLUS or p[i] == MINUS then i = i + 1 end
    if DIGIT[p[i]] == 0 then return -1 - i end
    while DIGIT[p[i]] ~= 0 do i = i + 1 end
  end
  return i
end

local function literal_end(p, i)
  if p[i] == 116 and p[i + 1] == 114 and p[i + 2] == 117 and p[i + 3] == 101 then return i + 4 end -- true
  if p[i] == 110 and p[i + 1] == 117 and p[i + 2] == 108 and p[i + 3] == 108 then return i + 4 end -- null
  if p[i] == 102 and p[i + 1] == 97 and p[i + 2] == 108 and p[i + 3] == 115 and p[i + 4] == 101 then -- false
    return i + 5
  end
  return -1 - i
end

-- i: at the opening quote of a key. Returns where its value begins.
local function key_end(p, i)
  if p[i] ~= QUOTE then return -1 - i end
  i = string_end(p, i + 1)
  if i < 0 then return i end
  i = skip_space(p, i)
  if p[i] ~= COLON then return -1 - i end
  return skip_space(p, i + 1)
end

local open = ffi.new("uint8_t[?]", MAX_DEPTH + 1) -- the opening bracket of each container around position i
local fault -- what is wrong at the position that is returned

-- depth: containers open around this value. Not recursive: the client chooses how deep a body is.
local function value_end(p, i, depth)
  local outside = depth
  while true do
    local c = p[i]
    if c == QUOTE then
      i = string_end(p, i + 1)
    elseif c == OBJECT or c == ARRAY then
      if depth == MAX_DEPTH then
        fault = "more than 512 levels of nesting"
        return -1 - i
      end
      depth = depth + 1
      open[depth] = c
      i = skip_space(p, i + 1)
      if p[i] == c + 2 then -- } is { + 2, and ] is [ + 2
        depth = depth - 1
        i = i + 1
      else
        if c == OBJECT then
          i = key_end(p, i)
          if i < 0 then return i end
        end
        goto next_value
      end
    elseif c == MINUS or DIGIT[c] ~= 0 then
      i = number_end(p, i)
    else
      i = literal_end(p, i)
    end
    if i < 0 then return i end
    -- a value ended at i: the containers that end with it, up to the next value
    while true do
      if depth == outside then return i end
      i = skip_space(p, i)
      c = p[i]
      if c == COMMA then
        i = skip_space(p, i + 1)
        if open[depth] == OBJECT then
          i = key_end(p, i)
          if i < 0 then return i end
        end
        break
      elseif c == open[depth] + 2 then
        depth = depth - 1
        i = i + 1
      else
        return -1 - i
      end
    end
    ::next_value::
  end
end

local UNESCAPED = { b = "\b", f = "\f", n = "\n", r = "\r", t = "\t" }

local function utf8(code)
  if code < 0x80 then return string.char(code) end
  if code < 0x800 then return string.char(0xC0 + math.floor(code / 0x40), 0x80 + code % 0x40) end
  local tail = string.char(0x80 + math.floor(code / 0x40) % 0x40, 0x80 + code % 0x40)
  if code < 0x10000 then return string.char(0xE0 + math.floor(code / 0x1000)) .. tail end
  return string.char(0xF0 + math.floor(code / 0x40000), 0x80 + math.floor(code / 0x1000) % 0x40) .. tail
end

-- The value of a valid JSON string, given the text between its quotes; not all of it when longer than limit.
local function unescape(text, limit)
  local out, length, at = {}, 0, 1
  while length <= limit do
    local slash = find(text, "\\", at, true)
    local piece = sub(text, at, (slash or 0) - 1)
    if slash then
      local c = sub(text, slash + 1, slash + 1)
      at = slash + 2
      if c == "u" then
        local code = tonumber(sub(text, at, at + 3), 16)
        at = at + 4
        local low = match(text, "^\\u([dD][c-fC-F]%x%x)", at)
        if low and code >= 0xD800 and code < 0xDC00 then
          code = 0x10000 + (code - 0xD800) * 0x400 + tonumber(low, 16) - 0xDC00
          at = at + 6
        end
        piece = piece .. utf8(code)
      else
        piece = piece .. (UNESCAPED[c] or c)
      end
    end
    out[#out + 1] = piece
    length = length + #piece
    if not slash then break end
  end
  return concat(out)
end

local function quote(text)
  return '"' .. text:gsub('[%c"\\]', function(c) return ("\\u%04x"):format(byte(c)) end) .. '"'
end

-- --------------------------------------------------------------------------------------------------
-- The merge plan: what filter_context says, ready for the splice. A node stands for one object, the body or
-- an object in it; an entry stands for a member of it.
--   node:  {entries = in configured order, by_key, lengths = set of key lengths, longest,
--           text = all entries, for insertion;
--           if_stream = the entry that is to be inserted when the final `stream` is true, or nil: no other;
--           in the root also model = its entry, with the name for logs, and stream = its entry}
--   entry: {key, value, text = '"key":value', force, node = of the inner object or nil,
--           seen = mark of the last pass that met it}

local function new_node()
  return { entries = {}, by_key = {}, lengths = {}, longest = 0 }
end

local function add_entry(node, key)
  local entry = { key = key, seen = 0 }
  node.by_key[key] = entry
  node.lengths[#key] = true
  node.longest = math.max(node.longest, #key)
  return entry
end

local finish

local function finish_entry(entry)
  if entry.node then
    finish(entry.node)
    entry.value = "{" .. (entry.node.if_stream and entry.node.if_stream.text or entry.node.text) .. "}"
  end
  entry.text = quote(entry.key) .. ":" .. entry.value
  return entry.text
end

function finish(node)
  local texts = {}
  for n, entry in ipairs(node.entries) do texts[n] = finish_entry(entry) end
  if node.if_stream then finish_entry(node.if_stream) end
  node.text = concat(texts, ",")
end

local MODEL_LENGTH = 128

local MAX_NAMES = 256
local names, name_count = {}, 0 -- of models, by their JSON text

-- A model for logs and metrics, from JSON text: cut and made printable; nil if it is no string or empty.
local function model_name(text)
  if names[text] then return names[text] end
  if byte(text) ~= QUOTE then return nil end
  local name = sub(text, 2, -2)
  if find(name, "\\", 1, true) then name = unescape(name, MODEL_LENGTH) end
  name = sub(name, 1, MODEL_LENGTH):gsub("[^ -~]", "?")
  if name == "" then return nil end
  if #text <= MODEL_LENGTH and name_count < MAX_NAMES then
    names[text], name_count = name, name_count + 1
  end
  return name
end

local function merge_plan(members)
  local root = new_node()
  for mode, value, key, inner in gmatch(members, "([^\31]*)\31([^\31]*)\31([^\31]*)\31([^\31]*)\31") do
    key = unescape(sub(key, 2, -2), math.huge)
    local force, if_stream = mode == "force", mode == "fill_stream"
    local entry = root.by_key[key]
    if not entry then
      entry = add_entry(root, key)
      if if_stream then
        root.if_stream = entry
      else
        root.entries[#root.entries + 1] = entry
      end
    end
    if inner ~= "" then
      entry.node = entry.node or new_node()
      local leaf = add_entry(entry.node, unescape(sub(inner, 2, -2), math.huge))
      if if_stream then
        entry.node.if_stream = leaf
      else
        entry.node.entries[#entry.node.entries + 1] = leaf
      end
      leaf.value, leaf.force = value, force
    else
      entry.value = value
    end
    entry.force = entry.force or force -- an inner member that is forced replaces a value that is no object
  end
  finish(root)
  -- the model and `stream` are looked at even where nothing is configured for them
  root.model = root.by_key.model or add_entry(root, "model")
  root.model.name = root.model.value and model_name(root.model.value)
  root.stream = root.by_key.stream or add_entry(root, "stream")
  return root
end

-- OpenTelemetry's gen_ai.operation.name; other operations are called by their paths.
local OPERATION_NAMES = {
  ["/chat/completions"] = "chat",
  ["/responses"] = "chat",
  ["/messages"] = "chat",
  ["/completions"] = "text_completion",
  ["/embeddings"] = "embeddings",
}

local function operation_name(suffix)
  local gemini = find(suffix, ":generateContent", 1, true) or find(suffix, ":streamGenerateContent", 1, true)
  return OPERATION_NAMES[suffix] or gemini and "generate_content" or sub(suffix, 2)
end

local function provider_plan(context)
  local prefix, models, max_bytes, operations = match(context:get("data"), "^(.-)\31(%d+)\31(%d*)(.*)$")
  local plan = { host = context:get("host"), models = tonumber(models), operations = {} }
  plan.max_bytes = tonumber(max_bytes) or math.huge
  local served = {}
  for text, members in gmatch(operations, "\30([^\30\31]+)([^\30]*)") do
    local method, suffix, path = match(text, "^(%S+) (%S+) ?(%S*)$")
    plan.operations[#plan.operations + 1] = {
      method = method,
      suffix = suffix,
      name = operation_name(suffix),
      path = path ~= "" and path or prefix .. suffix,
      root = members ~= "" and merge_plan(sub(members, 2)) or nil,
      streams = find(suffix, ":stream", 1, true) ~= nil, -- Gemini's, whatever the body says
    }
    served[#served + 1] = method .. " " .. suffix
  end
  plan.own = plan.operations[1]
  plan.served = concat(served, ", ")
  return plan
end

-- Plans are kept in the VM, which all providers of a worker share (shared_vm_id). A changed provider has a
-- new id and its old plan stays behind: when there are too many, all go, and those in use are made again.
local MAX_PLANS = 1024
local plans, plan_count = {}, 0

local function plan_of(context)
  local id = context:get("id")
  local plan = plans[id]
  if not plan then
    if plan_count == MAX_PLANS then
      plans, plan_count = {}, 0
    end
    plan = provider_plan(context)
    plans[id], plan_count = plan, plan_count + 1
  end
  return plan
end

-- --------------------------------------------------------------------------------------------------
-- The splice

-- Edits of one pass in the order of their places: edit_text replaces the bytes from edit_from up to edit_to.
local edit_from, edit_to, edit_text, edits = {}, {}, {}, 0
-- A key that is repeated a million times must not become a million times a long configured value.
local MAX_EDITS = 1000
local model_from, model_to -- the value of the last "model" member of the body
local stream_from -- that of the last "stream" member begins here
-- What some of the edits insert if the final `stream` is true, which is known at the end of the pass.
local late_edit, late_text, lates = {}, {}, 0
local mark = 0

local function edit(from, to, text)
  edits = edits + 1
  edit_from[edits], edit_to[edits], edit_text[edits] = from, to, text
end

-- What is to be inserted into an object: the entries that this pass did not meet in it.
local function missing(node, pass, met)
  if met == 0 or node.text == "" then return node.text end
  local texts = {}
  for _, entry in ipairs(node.entries) do
    if entry.seen ~= pass then texts[#texts + 1] = entry.text end
  end
  return concat(texts, ",")
end

-- The entry for the key between the quotes at from - 1 and to, or nil.
local function entry_of(node, s, from, to, escaped)
  if escaped then return node.by_key[unescape(sub(s, from + 1, to), node.longest)] end
  if node.lengths[to - from] then return node.by_key[sub(s, from + 1, to)] end
  return nil
end

-- The object at p[i], whose members are to be merged with those of node. Each occurrence of a key counts: a
-- parser may take the first or the last of two equal keys, and neither may find what the client sent for a
-- forced member.
local function object_end(s, p, i, node, depth)
  mark = mark + 1
  local pass, met = mark, 0
  edit(i + 1, i + 1, "")
  local insertion = edits
  i = skip_space(p, i + 1)
  local empty = p[i] == OBJECT_END
  while not empty do
    local key = i + 1
    if p[i] ~= QUOTE then return -1 - i end
    i = key
    while SPECIAL[p[i]] == 0 do i = i + 1 end
    local escaped = p[i] == BACKSLASH
    i = string_end(p, i)
    if i < 0 then return i end
    local entry = entry_of(node, s, key, i - 1, escaped)
    i = skip_space(p, i)
    if p[i] ~= COLON then return -1 - i end
    i = skip_space(p, i + 1)
    local value = i
    if entry and entry.node and p[i] == OBJECT then
      i = object_end(s, p, i, entry.node, depth + 1)
      if i < 0 then return i end
    else
      i = value_end(p, i, depth)
      if i < 0 then return i end
      if entry and entry.force then edit(value, i, entry.value) end
    end
    if entry then
      if edits > MAX_EDITS then
        fault = "too many equal keys"
        return -1 - value
      end
      entry.seen, met = pass, met + 1
      if entry == node.model then model_from, model_to = value, i end
      if entry == node.stream then stream_from = value end
    end
    i = skip_space(p, i)
    if p[i] == OBJECT_END then break end
    if p[i] ~= COMMA then return -1 - i end
    i = skip_space(p, i + 1)
  end
  local text = missing(node, pass, met)
  local comma = empty and "" or ","
  edit_text[insertion] = text ~= "" and text .. comma or ""
  if node.if_stream and node.if_stream.seen ~= pass then
    lates = lates + 1
    late_edit[lates] = insertion
    late_text[lates] = (text ~= "" and text .. "," or "") .. node.if_stream.text .. comma
  end
  return i + 1
end

-- Whether the body, as it is sent, asks for a stream.
local function streams(p, entry)
  if stream_from and not entry.force then return p[stream_from] == 116 end -- t of true
  return entry.value == "true"
end

-- Where the result is put together; kept, unless it got large: fresh memory costs as much as the pass itself.
local output = require("string.buffer").new()
local KEPT_OUTPUT = 4 * 1024 * 1024

-- Returns the body with the members of root merged in, its model or nil, whether it asks for a stream, and whether
-- members for streams were inserted; or nil and what is wrong.
local function splice(s, root)
  local p = ffi.cast(BYTES, s)
  edits, lates, model_from, stream_from, last_four, fault = 0, 0, nil, nil, #s - 4, "invalid JSON"
  local i = skip_space(p, 0)
  if p[i] ~= OBJECT then return nil, ("a JSON object is expected at byte %d"):format(i) end
  i = object_end(s, p, i, root, 1)
  if i >= 0 then
    i = skip_space(p, i)
    if i ~= #s then i = -1 - i end
  end
  if i < 0 then return nil, ("%s at byte %d"):format(fault, -1 - i) end

  local model = root.model.name
  if model_from and not root.model.force then model = model_name(sub(s, model_from + 1, model_to)) end

  local streaming = streams(p, root.stream)
  local added = streaming and lates > 0
  if added then
    for n = 1, lates do edit_text[late_edit[n]] = late_text[n] end
  end

  output:reset()
  local copied = 0
  for n = 1, edits do
    output:putcdata(p + copied, edit_from[n] - copied):put(edit_text[n])
    copied = edit_to[n]
  end
  local result = output:putcdata(p + copied, #s - copied):tostring()
  if #s > KEPT_OUTPUT then output:free() end
  return result, model, streaming, added
end

-- --------------------------------------------------------------------------------------------------
-- The request

-- Filter state that logs and metrics read. The operation is there for LLM operations only, and empty if it is refused.
local MODEL_STATE, OPERATION_STATE = "wasm.asm.llmproxy.request_model", "llm.operation"
-- The model as metrics show it: OTHER for what clients choose beyond the first so many (per VM).
local LABEL_STATE, OTHER = "llm.model_label", "other"
local PROMPT_STATE = "wasm.asm.llmproxy.request_prompt_tokens"
local COMPLETION_STATE = "wasm.asm.llmproxy.request_completion_tokens"
local RETRIED_STATE = "llm.retried_prompt_tokens"
-- Filter state for the response side: the time, in microseconds, behind ADDED if the usage chunk of the answer
-- is to be removed. There where a stream was asked for.
local ATTEMPT_STATE, ADDED = "llm.attempt", "+"

-- The metadata flag tells the listener's local_reply_config that the body is JSON already.
local function refuse(h, status, code, message, allow)
  local info = h:streamInfo()
  local state = info:filterState()
  if state:get(OPERATION_STATE) then state:set(OPERATION_STATE, "envoy.string", "") end
  info:dynamicMetadata():set("llm", "error", true)
  local kind = status == "500" and "server_error" or "invalid_request_error"
  h:respond(
    { [":status"] = status, ["content-type"] = "application/json", allow = allow },
    ('{"error":{"message":%s,"type":"%s","param":null,"code":"%s"}}'):format(quote(message), kind, code)
  )
end

local function refuse_size(h, plan)
  local message = ("The request body is larger than %d bytes."):format(plan.max_bytes)
  return refuse(h, "413", "request_too_large", message)
end

-- Header changes of an attempt are there in the next one; the client's path is kept in filter state, which no
-- client can write. Returns it, and whether this is a later attempt.
local function client_path(state, headers)
  local kept = state:get("llm.path")
  if kept then return kept, true end
  local path = headers:get(":path") or ""
  state:set("llm.path", "envoy.string", path)
  return path, false
end

-- Returns the operation that the client's path (without query) names; or nil and the path's methods, if any.
local function operation_of(plan, method, path)
  if path == "" or path == "/" then
    if method == "POST" then return plan.own end
    return nil, "POST"
  end
  local longest, found, allow = 0, nil, nil
  for _, operation in ipairs(plan.operations) do
    local suffix = operation.suffix
    if #suffix >= longest and sub(path, -#suffix) == suffix then
      if #suffix > longest then
        longest, found, allow = #suffix, nil, nil
      end
      allow = allow and allow .. ", " .. operation.method or operation.method
      if operation.method == method then found = operation end
    end
  end
  return found, allow
end

local shown, shown_count = {}, 0

local function label_of(model, plan)
  if shown[model] then return model end
  if shown_count >= plan.models then return OTHER end
  shown[model], shown_count = true, shown_count + 1
  return model
end

local function seconds(time) return ("%.6f"):format(time / 1e6) end -- as Envoy's metrics take it

local function microseconds(h) return h:timestampString(EnvoyTimestampResolution.MICROSECOND) end

local TOKENS_PER_BYTE = 1 / 4 -- where nobody counted

local function handle(h)
  local plan = plan_of(h:filterContext())
  local headers = h:headers()
  local state = h:streamInfo():filterState()
  local target, again = client_path(state, headers)
  local method = headers:get(":method")
  -- The injector of the attempt before has written its key here, and a provider without one would get it. What
  -- else must not leave, the listener and the routes remove once.
  headers:remove("authorization")
  headers:replace(":authority", plan.host)

  local query = find(target, "?", 1, true)
  local operation, allow = operation_of(plan, method, query and sub(target, 1, query - 1) or target)
  if not operation then
    if allow then return refuse(h, "405", "method_not_allowed", "Allowed here: " .. allow .. ".", allow) end
    return refuse(h, "404", "unknown_url", "Unknown request path. Served here: " .. plan.served .. ".")
  end

  -- Only the client's own: an attempt before has written the length of what it made of the body.
  if plan.max_bytes < math.huge and not again then
    local announced = tonumber(headers:get("content-length") or 0) or 0
    if announced > plan.max_bytes then return refuse_size(h, plan) end
  end

  if not operation.root then
    local path = operation.path
    if query then path = path .. (find(path, "?", 1, true) and "&" or "?") .. sub(target, query + 1) end
    headers:replace(":path", path)
    if again then -- an attempt before may have left a model, and the length of the body that it made
      for _, key in ipairs({ MODEL_STATE, LABEL_STATE, OPERATION_STATE, ATTEMPT_STATE }) do
        state:set(key, "envoy.string", "")
      end
      if headers:get("content-length") then
        local body = h:body(true)
        body:setBytes(body:getBytes(0, body:length()))
      end
    end
    return
  end

  headers:replace(":path", operation.path)
  local encoding = headers:get("content-encoding") or "identity"
  if encoding:lower() ~= "identity" then
    return refuse(h, "415", "unsupported_content_encoding", "The request body must not be compressed.")
  end
  local content_type = headers:get("content-type") or ""
  if sub(content_type, 1, 10):lower() == "multipart/" then
    return refuse(h, "415", "unsupported_media_type", "The request body must be JSON.")
  end
  if content_type ~= "application/json" then headers:replace("content-type", "application/json") end

  local forced = operation.root.model.force and operation.root.model.name
  if forced then
    state:set(MODEL_STATE, "envoy.string", forced)
    state:set(LABEL_STATE, "envoy.string", forced)
  end
  state:set(OPERATION_STATE, "envoy.string", operation.name)
  local body = h:body(true) -- waits for the whole body; `headers` and `state` are dead from here on
  local size = body:length()
  if size > plan.max_bytes then return refuse_size(h, plan) end
  if size == 0 then return refuse(h, "400", "empty_body", "The request body is empty.") end
  local text = body:getBytes(0, size) -- held here while splice reads it through a pointer
  local spliced, model, streaming, added = splice(text, operation.root)
  if not spliced then
    return refuse(h, "400", "invalid_json", "The request body cannot be used: " .. model .. ".")
  end
  body:setBytes(spliced) -- also when nothing changed: it sets content-length, which may be another attempt's
  local tells, timed = not forced and (model or again), streaming or operation.streams
  if not (tells or timed or again) then return end -- filter state costs as much as all headers here
  state = h:streamInfo():filterState()
  if tells then
    state:set(MODEL_STATE, "envoy.string", model or "")
    local configured = not model or model == operation.root.model.name
    state:set(LABEL_STATE, "envoy.string", configured and model or model and label_of(model, plan) or "")
  end
  if timed or again then
    state:set(ATTEMPT_STATE, "envoy.string", timed and (added and ADDED or "") .. microseconds(h) or "")
  end
  if again then -- Envoy drops the answer of an attempt that it repeats: what that cost is an estimate
    local retried = (tonumber(state:get(RETRIED_STATE) or "") or 0) + math.ceil(size * TOKENS_PER_BYTE)
    state:set(RETRIED_STATE, "envoy.string", ("%d"):format(retried))
  end
end

-- --------------------------------------------------------------------------------------------------
-- Reading a response
--
-- Its JSON is scanned in pieces as they come. Nothing is decoded and nothing is kept, but for the place in the
-- nesting and the last bytes of a piece where they may be something of interest cut short. Looked at are:
--   OpenAI chat, completions, embeddings: usage, model and choices of the object itself
--   OpenAI Responses, in streams:         the same of its member response
--   Groq, in streams:                     the same of its member x_groq
--   Anthropic, in streams:                the same of its member message, and usage of the object itself
--   Gemini:                               usageMetadata and modelVersion, of each object where it is an array
-- and, at any depth, the strings that hold what the model says.

local KEYS = {
  usage = "usage", usageMetadata = "usage",
  model = "model", modelVersion = "model",
  choices = "choices",
  response = "inner", message = "inner", x_groq = "inner",
  content = "content", text = "content", delta = "content", refusal = "content", arguments = "content",
  partial_json = "content", reasoning = "content", reasoning_content = "content", thinking = "content",
}
local LONGEST_KEY = 17
local CANDIDATE = ffi.new("uint8_t[?]", 256 * 32) -- by first character and length: may it be one of these keys?
for key in pairs(KEYS) do CANDIDATE[byte(key) * 32 + #key] = 1 end

-- What the numbers in a usage object count. `input` is without what Anthropic's cache read or wrote.
local COUNTS = {
  prompt_tokens = "prompt", promptTokenCount = "prompt", toolUsePromptTokenCount = "tool_use",
  input_tokens = "input", cache_read_input_tokens = "cache_read", cache_creation_input_tokens = "cache_creation",
  cached_tokens = "cached", cachedContentTokenCount = "cached", prompt_cache_hit_tokens = "cached",
  completion_tokens = "completion", output_tokens = "completion", candidatesTokenCount = "completion",
  reasoning_tokens = "reasoning", thoughtsTokenCount = "thoughts",
  total_tokens = "total", totalTokenCount = "total",
}
local DETAILS = {
  prompt_tokens_details = true, completion_tokens_details = true,
  input_tokens_details = true, output_tokens_details = true,
}

local BETWEEN = ffi.new("uint8_t[256]") -- what matters between strings; a piece ends with a control character
for c in ('"{}[]\r\n'):gmatch(".") do BETWEEN[byte(c)] = 1 end
BETWEEN[0] = 1

local MAX_TAIL = 16384 -- bytes of a usage object, if a piece ends in it

-- A reader belongs to one response.
local function new_reader()
  return {
    -- the place in an object, or an array of objects, at the end of a piece
    depth = 0, -- arrays and objects that are open
    base = 1, -- depth of the object's own members
    look = 1, -- depth of the members that are looked at: one more in a member of the kind "inner"
    inner = nil, -- the key of that member
    inside = false, -- in a string whose beginning is gone
    escaped = false, -- the next character is, too
    measured = false, -- the string is content
    -- what the object has
    choices = nil, -- "some" or "none"
    carry = nil, -- of events: a member of interest that goes on in the next line of data, as far as it is there
    usage = nil, -- "running", "final", or "begun": without the output yet
    silent_until = 0, -- what `content` was when it began
    -- what the response has
    counts = {}, -- by the names of COUNTS; some: whether the last usage object had any
    content = 0, -- bytes
    pieces = 0, -- objects with content
    model = nil,
    is_operation = nil, -- the request is an LLM operation, once that was looked at
    known = false, -- the counts include the output so far ..
    reported = false, -- .. and all of it
    -- of events only
    stream = false,
    removing = false, eol = nil, line = nil, tail = "", held = "", whole = true, -- see there
    -- what logs and metrics were told
    told = {},
    due = 1, -- completion tokens of the next estimate that it is told
  }
end

local function restart(r)
  r.depth, r.base, r.look, r.inner = 0, 1, 1, nil
  r.inside, r.escaped, r.measured = false, false, false
  r.choices, r.usage, r.silent_until, r.carry = nil, nil, r.content, nil
end

-- An object has ended.
local function finish_object(r)
  local speaks = r.content > r.silent_until
  if speaks then r.pieces = r.pieces + 1 end
  if r.usage == "running" or r.usage == "final" then
    r.known, r.reported = true, r.usage == "final" or not speaks
  elseif speaks then
    r.known, r.reported = false, false
  end
  restart(r)
end

-- p[i] is the beginning of a valid object.
local function read_counts(s, p, i, counts)
  i = skip_space(p, i + 1)
  while p[i] ~= OBJECT_END do
    local key = sub(s, i + 2, string_end(p, i + 1) - 1)
    i = key_end(p, i)
    local to = value_end(p, i, 0)
    local name = COUNTS[key]
    if name and DIGIT[p[i]] ~= 0 then
      local count = tonumber(sub(s, i + 1, to))
      if count < 2 ^ 53 then
        counts[name], counts.some = math.floor(count), true
      end
    elseif DETAILS[key] and p[i] == OBJECT then
      read_counts(s, p, i, counts)
    end
    i = skip_space(p, to)
    if p[i] == COMMA then i = skip_space(p, i + 1) end
  end
end

local function read_usage(r, s, p, i)
  local counts = r.counts
  local before = counts.completion
  counts.some = nil
  read_counts(s, p, i, counts)
  if not counts.some then return end
  r.usage = r.inner and "final" or "running"
  if r.inner == "message" then -- Anthropic's first event; its output_tokens are those of the beginning
    r.usage, counts.completion = "begun", before
  end
end

local SHORT = 32 -- bytes from which on a search is faster than the loop below

-- What closing_quote returns.
local function far_quote(s, p, i, n)
  local from = i
  while true do
    local at = find(s, '"', i + 1, true)
    local to = at and at <= n and at - 1 or n
    local text = to
    while text > from and p[text - 1] == BACKSLASH do text = text - 1 end
    local escaped = (to - text) % 2 == 1
    if to == n then return escaped and n + 1 or n end
    if not escaped then return to end
    i = to + 1
  end
end

-- The quote that ends the string around p[i]; or n, or n + 1 if the character at n is escaped.
local function closing_quote(s, p, i, n)
  local near = i + SHORT
  while i < n do
    if i >= near then return far_quote(s, p, i, n) end
    local to = math.min(last_four, near)
    while i <= to and SPECIAL[p[i]] + SPECIAL[p[i + 1]] + SPECIAL[p[i + 2]] + SPECIAL[p[i + 3]] == 0 do
      i = i + 4
    end
    while SPECIAL[p[i]] == 0 and i < near do i = i + 1 end
    if i >= n or p[i] == QUOTE then return i end
    if SPECIAL[p[i]] ~= 0 then i = i + (p[i] == BACKSLASH and 2 or 1) end
  end
  return i
end

-- The rest of the string around p[i], of which the beginning is gone or not of interest; n if it goes on there.
local function finish_string(r, s, p, i, n)
  local to = closing_quote(s, p, i, n)
  if r.measured then r.content = r.content + math.min(to, n) - i end
  if to < n then
    r.inside, r.measured = false, false
    return to + 1
  end
  r.inside, r.escaped = true, to > n
  return n
end

-- A string ended before p[i]. If it is the key of a member that matters, reads or enters the value. Returns
-- where to go on; or -1 if the piece, which ends at n, ends too early.
local function read_member(r, s, p, from, i, n)
  local key = sub(s, from + 2, i - 1)
  local role = KEYS[key]
  if not role or role ~= "content" and r.depth ~= r.look then return i end
  local at = skip_space(p, i)
  if p[at] ~= COLON then return at < n and i or -1 end
  at = skip_space(p, at + 1)
  if at >= n then return -1 end
  local c = p[at]
  if role == "content" then
    if c ~= QUOTE then return at end
    r.measured = true
    return finish_string(r, s, p, at + 1, n)
  elseif role == "choices" then
    if c ~= ARRAY then return at end
    local first = skip_space(p, at + 1)
    if first >= n then return -1 end
    r.choices = p[first] == ARRAY + 2 and "none" or "some"
    return at
  elseif role == "inner" then
    if c ~= OBJECT or r.inner then return at end
    r.inner, r.depth, r.look = key, r.depth + 1, r.look + 1
    return at + 1
  end
  if role == "model" and r.model or c ~= (role == "model" and QUOTE or OBJECT) then return at end
  local to = value_end(p, at, 0)
  if to < 0 then return -1 - to >= n - 6 and -1 or at end -- 6: a literal or an escape may be cut
  if role == "model" then
    r.model = model_name(sub(s, at + 1, to))
  else
    read_usage(r, s, p, at)
  end
  return to
end

-- Reads from p[i] up to p[n], which is a control character. `more`: the text goes on behind n. Returns from where
-- it must be read again then; n if all was read.
local function scan(r, s, p, i, n, more)
  if r.inside and i < n then
    if r.escaped then i = i + 1 end
    i = finish_string(r, s, p, i, n)
  end
  local depth, rest = r.depth, n
  while true do
    while BETWEEN[p[i]] == 0 do i = i + 1 end
    if i >= n then break end
    local c = p[i]
    if c == QUOTE then
      local from = i
      i = closing_quote(s, p, i + 1, n) + 1
      local length = i - from - 2
      if length <= LONGEST_KEY and (i > n or CANDIDATE[p[from + 1] * 32 + length] ~= 0) then
        local on = -1
        if i <= n then
          r.depth = depth
          on = read_member(r, s, p, from, i, n)
          depth = r.depth
        end
        if on >= 0 then
          i = on
        elseif n - from <= MAX_TAIL then
          rest = from
          if not more then r.carry = sub(s, from + 1, n) end
          break
        end
      elseif i > n then
        r.inside, r.escaped = true, i > n + 1
      end
    elseif c == OBJECT or c == ARRAY then
      depth = depth + 1
      if depth == 1 then
        r.base = c == ARRAY and 2 or 1
        r.look = r.base
      end
      i = i + 1
    elseif c == OBJECT_END or c == ARRAY + 2 then
      depth = depth - 1
      if depth == r.base and r.inner then
        r.look, r.inner = r.base, nil
      elseif depth < 0 then
        depth = 0
      end
      i = i + 1
    else
      i = i + 1
    end
  end
  r.depth = depth
  if not more then r.inside, r.escaped, r.measured = false, false, false end
  return rest
end

-- JSON. s begins with what the last piece left.
local function read_json(r, s)
  last_four = #s - 4
  local rest = scan(r, s, ffi.cast(BYTES, s), 0, #s, true)
  r.tail = sub(s, rest + 1)
end

-- --------------------------------------------------------------------------------------------------
-- Server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html)
--
-- A reader of events has, besides:
--   removing: the usage chunk is to be taken out: {"choices": [], "usage": {...}, ...}
--   eol:      "\n" (also for "\r\n") or "\r", what ends a line, once there was one
--   line:     "data" or "other", if the last piece ended in the middle of a line
--   tail:     what is to be read again with the next piece. It was passed on already
--   held:     or it was not: it may be the beginning of the usage chunk
--   whole:    nothing of the event at hand was passed on
--   around:   how much longer than its content the first event with content is; and
--   gap:      what ended it. From there on, most events are not scanned

local MAX_HELD = 4096
local DATA = "data:"

local function line_end(s, i)
  local at = find(s, "[\r\n]", i + 1)
  if not at or at == #s and byte(s, at) == 13 then return nil end -- cannot tell yet
  return byte(s, at) == 13 and byte(s, at + 1) ~= 10 and "\r" or "\n"
end

-- What begins at p[i]: "blank", "data", "other"; or nil if p[n] is the end of the piece and it is too early to say.
local function line_kind(s, p, i, n, cut)
  if n == i or n == i + 1 and p[i] == 13 then return not cut and "blank" or nil end
  if p[i] == 100 and p[i + 1] == 97 and p[i + 2] == 116 and p[i + 3] == 97 and p[i + 4] == 58 then return "data" end
  if cut and n - i < #DATA and sub(DATA, 1, n - i) == sub(s, i + 1, n) then return nil end
  return "other"
end

local function is_usage_chunk(r) return r.choices == "none" and r.usage == "running" end

local function may_be_usage_chunk(r)
  return r.choices ~= "some" and r.base == 1 and r.content == r.silent_until
end

-- Where the next usage that is not null begins in s, from i on.
local function next_usage(s, i)
  while true do
    local at, to = find(s, "usage", i + 1, true)
    if not at then return math.huge end
    local quote, colon, value, next_value = byte(s, to + 1, to + 4)
    local null = quote == QUOTE and colon == COLON and (value == 110 or next_value == 110) -- n
    if byte(s, at - 1) == QUOTE and not null then return at end
    i = to
  end
end

local MAX_GUESS = 64 -- bytes of content; an event that is longer may be another kind of event

-- Skips events without usage: what else is looked for was in the events before. Returns where they end. Their
-- content is guessed from their length and that of the first one with content.
local function skip_events(r, s, i)
  local usage, events, content = next_usage(s, i), 0, 0
  while true do
    local _, to = find(s, r.gap, i + 1, true)
    local length = to and to - i - r.around
    if not to or to > usage or length > MAX_GUESS then break end
    if length > 0 then
      events, content = events + 1, content + length
    end
    i = to
  end
  if events > 0 then
    r.pieces, r.content, r.known, r.reported = r.pieces + events, r.content + content, false, false
    r.silent_until = r.content
  end
  return i
end

-- Reads a line of data together with the member that the last line ended in.
local function read_next_line(r, line)
  local text = r.carry .. "\n" .. line
  r.carry = nil
  last_four = #text - 4
  scan(r, text, ffi.cast(BYTES, text), 0, #text, false)
end

-- Reads a piece; s begins with what the last one left. Returns what to pass on instead, or nil: as it is.
local function read_events(r, s)
  local size, i = #s, 0
  local event = r.whole and 0 or nil -- where the event at hand begins, if nothing of it was passed on
  if r.around and event then
    i = skip_events(r, s, 0)
    event = i
    if i == size and r.held == "" then return nil end
  end
  local p = ffi.cast(BYTES, s)
  last_four = size - 4
  local changed, out = r.held ~= "", ""
  local copied = #r.tail -- up to here, s was passed on
  local rest = size -- from here on, s is to be read again
  r.eol = r.eol or line_end(s, 0)
  while i < size do
    local eol = r.eol and find(s, r.eol, i + 1, true)
    local to = eol and eol - 1 or size
    if not r.eol and p[size - 1] == 13 then -- may be the first half of "\r\n"
      to = size - 1
      rest = to
    end
    local kind = r.line or line_kind(s, p, i, to, not eol)
    if kind == "data" and r.carry and not r.line and to - i <= MAX_TAIL then
      if eol then
        read_next_line(r, sub(s, i + #DATA + 1, to))
        last_four = size - 4
      else
        rest, kind = i, nil
      end
    elseif kind == "data" then
      r.carry = nil
      local from = scan(r, s, p, r.line and i or i + #DATA, to, not eol)
      if not eol then rest = from end
    elseif kind == "blank" then
      if r.removing and event and is_usage_chunk(r) then
        out, copied, changed, r.removing = out .. sub(s, copied + 1, event), eol, true, false
      end
      if not r.around and event and r.content > r.silent_until then
        r.around = eol - event - (r.content - r.silent_until)
        r.gap = r.eol == "\n" and p[eol - 2] == 13 and "\r\n\r\n" or r.eol .. r.eol
      end
      finish_object(r)
      if r.around then eol = skip_events(r, s, eol) end
      event = eol
    elseif not kind then
      rest = i
    end
    r.line = not eol and kind or nil
    i = eol or size
  end

  r.tail, r.held = "", ""
  if r.removing and event and size > event and size - event <= MAX_HELD and may_be_usage_chunk(r) then
    r.held, r.line, r.whole = sub(s, event + 1), nil, true
    restart(r)
    return out .. sub(s, copied + 1, event)
  end
  r.tail, r.whole = sub(s, rest + 1), event == size
  return changed and out .. sub(s, copied + 1) or nil
end

-- The stream has ended. Returns what was held and is to be passed on after all.
local function finish_events(r)
  local held = r.held
  if held ~= "" then
    local eol = r.eol or "\n"
    read_events(r, held .. eol .. eol)
    if not r.removing then held = "" end -- it was the usage chunk
  end
  finish_object(r)
  return held
end

-- --------------------------------------------------------------------------------------------------
-- Compressed answers: gzip (RFC 1952) and deflate (RFC 1950, or 1951 alone, which some servers send)
--
-- Envoy's own decompressor cannot stand in a cluster, and one in front of the router would come behind this script
-- and cost all requests something. Checksums are not looked at.
--
-- A symbol is decoded from the 16 bits at a position, which is a count of bits. Behind the input there are zeros,
-- so that what is not all there can be tried: what would end behind the input waits for the next piece.

local HALF, WINDOW = 32768, 65536 -- how far back a copy may reach; and twice that
local PADDING = ("\0"):rep(16)
local LONGEST = 48 -- bits of a length with its distance
local FAST = 9 -- bits of the codes that are looked up
local MAX_HEADER = 1024 -- bytes
local MAX_RATIO, MAX_FREE = 100, 1048576 -- the ratio is Envoy's; so many bytes may always come

local CODE = ffi.typeof("struct { uint16_t count[16], symbol[288], fast[512]; }")
local COUNTS = ffi.typeof("uint16_t[16]")
local CODES = ffi.typeof("struct { $ literals, distances; }", CODE)
local STATE = ffi.typeof([[struct {
  int pos, limit, at, shown, left;
  uint8_t window[66048], lengths[320];
  $ codes;
}]], CODES)

local function numbers(list) return ffi.new("const uint16_t[?]", #list, list) end
local LENGTH = numbers({
  3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 15, 17, 19, 23, 27, 31, 35, 43, 51, 59, 67, 83, 99, 115, 131, 163, 195, 227,
  258,
})
local LENGTH_BITS = numbers({
  0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 0,
})
local DISTANCE = numbers({
  1, 2, 3, 4, 5, 7, 9, 13, 17, 25, 33, 49, 65, 97, 129, 193, 257, 385, 513, 769, 1025, 1537, 2049, 3073, 4097,
  6145, 8193, 12289, 16385, 24577,
})
local DISTANCE_BITS = numbers({
  0, 0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13,
})
local ORDER = numbers({ 16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15 })

local function bits(p, pos, count)
  local i = rshift(pos, 3)
  local three = bor(p[i], lshift(p[i + 1], 8), lshift(p[i + 2], 16))
  return band(rshift(three, band(pos, 7)), lshift(1, count) - 1)
end

-- Makes a code of the lengths of its symbols. Returns false if there cannot be one.
local function make_code(code, lengths, size)
  ffi.fill(code, ffi.sizeof(CODE))
  for n = 0, size - 1 do code.count[lengths[n]] = code.count[lengths[n]] + 1 end
  code.count[0] = 0
  local offset, free = COUNTS(), 1
  for length = 1, 15 do
    free = free * 2 - code.count[length]
    if free < 0 then return false end
    if length < 15 then offset[length + 1] = offset[length] + code.count[length] end
  end
  for n = 0, size - 1 do
    local length = lengths[n]
    if length > 0 then
      code.symbol[offset[length]] = n
      offset[length] = offset[length] + 1
    end
  end
  local value, n = 0, 0
  for length = 1, FAST do
    for _ = 1, code.count[length] do
      local reversed = 0
      for bit_number = 0, length - 1 do
        reversed = bor(reversed, lshift(band(rshift(value, bit_number), 1), length - 1 - bit_number))
      end
      for at = reversed, 511, lshift(1, length) do code.fast[at] = code.symbol[n] * 16 + length end
      value, n = value + 1, n + 1
    end
    value = value * 2
  end
  return true
end

-- Returns the symbol at pos, -1 if there is none, and the position behind it.
local function decode(code, p, pos)
  local next_bits = bits(p, pos, 16)
  local found = code.fast[band(next_bits, 511)]
  if found ~= 0 then return rshift(found, 4), pos + band(found, 15) end
  local value, first, index = 0, 0, 0
  for length = 1, 15 do
    value = bor(value, band(next_bits, 1))
    next_bits = rshift(next_bits, 1)
    local count = code.count[length]
    if value - first < count then return code.symbol[index + value - first], pos + length end
    index, first, value = index + count, (first + count) * 2, value * 2
  end
  return -1, pos
end

local FIXED = CODES()
do
  local lengths = ffi.new("uint8_t[288]", 8)
  ffi.fill(lengths + 144, 112, 9)
  ffi.fill(lengths + 256, 24, 7)
  make_code(FIXED.literals, lengths, 288)
  ffi.fill(lengths, 30, 5)
  make_code(FIXED.distances, lengths, 30)
end

-- An inflater has a state:
--   pos, limit: bits of the input that were read, and that there are
--   window:     what came out lately, up to `at`; up to `shown`, it was returned
--   left:       bytes of a block that is not compressed
--   codes:      those of the block at hand, unless they are the fixed ones
-- A step begins at pos of the input, which p points to, and returns the next one; nil: it needs more input; or
-- false: the input is faulty.

local function enough(state, size) return state.pos + size <= state.limit end

local function flush(z)
  local state = z.state
  z.parts[#z.parts + 1] = ffi.string(state.window + state.shown, state.at - state.shown)
  z.output = z.output + state.at - state.shown
  state.shown = state.at
end

-- Makes room in the window. Returns false if too much comes out of the input.
local function slide(z)
  local state = z.state
  flush(z)
  ffi.copy(state.window, state.window + state.at - HALF, HALF)
  state.at, state.shown = HALF, HALF
  return z.output <= MAX_FREE or z.output <= z.input * MAX_RATIO
end

local read_block

local function read_nothing(z)
  z.state.pos = z.state.limit
  return nil
end

local function read_deflate_header(z, p)
  if not enough(z.state, 16) then return nil end
  if band(p[0], 15) == 8 and band(p[1], 32) == 0 and (p[0] * 256 + p[1]) % 31 == 0 then z.state.pos = 16 end
  return read_block
end

local function read_gzip_header(z, p)
  local state = z.state
  local from, size = state.pos / 8, state.limit / 8
  if not enough(state, 80) then return nil end
  if p[from] ~= 31 or p[from + 1] ~= 139 or p[from + 2] ~= 8 then
    return z.members > 0 and read_nothing -- anything may stand behind the last member
  end
  local flags, at = p[from + 3], from + 10
  if band(flags, 4) ~= 0 then at = at + 2 + p[at] + p[at + 1] * 256 end
  for flag = 3, 4 do -- name, comment
    if band(flags, lshift(1, flag)) ~= 0 then
      while at < size and p[at] ~= 0 do at = at + 1 end
      at = at + 1
    end
  end
  if band(flags, 2) ~= 0 then at = at + 2 end
  if at > size then
    if size - from > MAX_HEADER then return false end
    return nil
  end
  z.members = z.members + 1
  state.pos = at * 8
  return read_block
end

local function read_trailer(z)
  local state = z.state
  if not z.gzip then return read_nothing end
  local pos = band(state.pos + 7, -8) + 64
  if pos > state.limit then return nil end
  state.pos = pos
  return read_gzip_header
end

local function next_block(z) return z.last and read_trailer or read_block end

local function read_stored(z, p)
  local state = z.state
  local size = math.min(state.left, (state.limit - state.pos) / 8, WINDOW - state.at)
  ffi.copy(state.window + state.at, p + state.pos / 8, size)
  state.at, state.pos, state.left = state.at + size, state.pos + size * 8, state.left - size
  if state.left == 0 then return next_block(z) end
  if state.at < WINDOW then return nil end
  return slide(z) and read_stored
end

local function read_codes(z, p)
  local state = z.state
  local codes, window = z.fixed and FIXED or state.codes, state.window
  local literals, distances = codes.literals, codes.distances
  local pos, limit, at, fault = state.pos, state.limit, state.at, false
  while at < WINDOW do
    local symbol, behind = decode(literals, p, pos)
    if symbol < 0 then
      fault = true
      break
    elseif symbol <= 256 then
      if behind > limit then break end
      pos = behind
      if symbol == 256 then
        state.pos, state.at = pos, at
        return next_block(z)
      end
      window[at] = symbol
      at = at + 1
    else
      symbol = symbol - 257
      if symbol > 28 then
        fault = true
        break
      end
      local length = LENGTH[symbol] + bits(p, behind, LENGTH_BITS[symbol])
      symbol, behind = decode(distances, p, behind + LENGTH_BITS[symbol])
      if symbol < 0 or symbol > 29 then
        fault = true
        break
      end
      local distance = DISTANCE[symbol] + bits(p, behind, DISTANCE_BITS[symbol])
      behind = behind + DISTANCE_BITS[symbol]
      if behind > limit then break end
      if distance > at then
        fault = true
        break
      end
      for i = at, at + length - 1 do window[i] = window[i - distance] end
      pos, at = behind, at + length
    end
  end
  state.pos, state.at = pos, at
  if at >= WINDOW then return slide(z) and read_codes end
  -- What looks wrong may be the zeros behind the input.
  if fault and enough(state, LONGEST) then return false end
  return nil
end

-- Reads the codes of a block.
local function read_tables(z, p)
  local state = z.state
  local pos, limit, lengths = state.pos, state.limit, state.lengths
  if not enough(state, 14) then return nil end
  local symbols, all = 257 + bits(p, pos, 5), 258 + bits(p, pos, 5) + bits(p, pos + 5, 5)
  local count = 4 + bits(p, pos + 10, 4)
  pos = pos + 14
  if pos + count * 3 > limit then return nil end
  ffi.fill(lengths, 19)
  for n = 0, count - 1 do
    lengths[ORDER[n]] = bits(p, pos, 3)
    pos = pos + 3
  end
  if symbols > 286 or not make_code(state.codes.literals, lengths, 19) then return false end
  local n = 0
  while n < all do
    local symbol, behind = decode(state.codes.literals, p, pos)
    local length, times = symbol, 1
    if symbol == 16 then
      length, times, behind = n > 0 and lengths[n - 1] or -1, 3 + bits(p, behind, 2), behind + 2
    elseif symbol == 17 then
      length, times, behind = 0, 3 + bits(p, behind, 3), behind + 3
    elseif symbol == 18 then
      length, times, behind = 0, 11 + bits(p, behind, 7), behind + 7
    end
    if behind > limit or symbol < 0 and pos + 15 > limit then return nil end
    if length < 0 or n + times > all then return false end
    ffi.fill(lengths + n, times, length)
    n, pos = n + times, behind
  end
  state.pos = pos
  return make_code(state.codes.literals, lengths, symbols)
    and make_code(state.codes.distances, lengths + symbols, all - symbols)
    and read_codes
end

function read_block(z, p)
  local state = z.state
  if not enough(state, 3) then return nil end
  local last, kind = bits(p, state.pos, 1), bits(p, state.pos + 1, 2)
  if kind == 0 then
    local at = band(state.pos + 3 + 7, -8) / 8
    if at * 8 + 32 > state.limit then return nil end
    state.left = p[at] + p[at + 1] * 256
    if state.left + p[at + 2] + p[at + 3] * 256 ~= 65535 then return false end
    z.last, state.pos = last == 1, at * 8 + 32
    return read_stored
  end
  z.last, state.pos = last == 1, state.pos + 3
  z.fixed = kind == 1
  if kind == 2 then return read_tables end
  return z.fixed and read_codes
end

local FIRST_STEP = { gzip = read_gzip_header, ["x-gzip"] = read_gzip_header, deflate = read_deflate_header }

-- Returns an inflater; nil if the encoding is not known.
local function new_inflater(encoding)
  local step = FIRST_STEP[encoding]
  if not step then return nil end
  return {
    state = STATE(),
    step = step, -- false behind a fault
    gzip = step == read_gzip_header,
    members = 0,
    last = false, -- the block is
    rest = "", -- input that the step needs again
    input = 0, -- bytes
    output = 0,
  }
end

-- Returns what comes out of a piece.
local function inflate(z, piece)
  if not z.step then return "" end
  local state = z.state
  local text = z.rest .. piece
  local padded = text .. PADDING
  local p = ffi.cast(BYTES, padded)
  z.input, z.parts = z.input + #piece, {}
  state.limit = #text * 8
  local step = z.step
  while step do
    z.step = step
    step = step(z, p)
  end
  if step == false then z.step = false end
  flush(z)
  local used = rshift(state.pos, 3)
  z.rest, state.pos = sub(text, used + 1), band(state.pos, 7)
  return concat(z.parts)
end

-- --------------------------------------------------------------------------------------------------
-- The response

-- Returns prompt and completion tokens as far as they are known or can be guessed; nil if neither.
local function tokens(h, r)
  local counts = r.counts
  local prompt, completion = counts.prompt, counts.completion
  if not prompt and counts.input then
    prompt = counts.input + (counts.cache_read or 0) + (counts.cache_creation or 0)
  end
  if r.stream and not r.known then
    if r.content == 0 and not prompt then return nil end
    completion = math.max(completion or 0, r.pieces, math.ceil(r.content * TOKENS_PER_BYTE))
  elseif not prompt and not completion then
    return nil
  end
  if not prompt then
    r.request_bytes = r.request_bytes or tonumber(h:requestHeaders():get("content-length") or 0)
    prompt = math.ceil(r.request_bytes * TOKENS_PER_BYTE)
  end
  prompt = prompt + (counts.tool_use or 0)
  completion = (completion or 0) + (counts.thoughts or 0)
  local reasoning = counts.reasoning
  -- xAI counts reasoning in the total only
  if reasoning and counts.total == prompt + completion + reasoning then completion = completion + reasoning end
  return prompt, completion
end

local function set(state, told, key, value)
  if value and told[key] ~= value then
    told[key] = value
    state:set(key, "envoy.string", type(value) == "number" and ("%d"):format(value) or value)
  end
end

-- Tells the metrics of what few requests have (translator/metrics.py). It is metadata, which a logger looks at
-- for less than at filter state.
local function note(h, told, key, value)
  if (told[key] or false) ~= value then
    told[key] = value
    h:streamInfo():dynamicMetadata():set("llm", key, value)
  end
end

-- Returns the filter state; nil if the request is no LLM operation.
local function state_of(h, r)
  local state = h:streamInfo():filterState()
  if r.is_operation == nil then r.is_operation = (state:get(OPERATION_STATE) or "") ~= "" end
  return r.is_operation and state or nil
end

-- Tells logs and metrics. Returns the completion tokens, if there are tokens to tell of.
local function tell(h, r, state)
  local told, counts = r.told, r.counts
  local prompt, completion = tokens(h, r)
  set(state, told, "llm.stream", r.stream and "true" or "false")
  set(state, told, "llm.response_model", r.model)
  if not prompt then return nil end
  local cached, reasoning = counts.cached or counts.cache_read, counts.reasoning or counts.thoughts
  if r.first and r.start then
    set(state, told, "llm.time_to_first_token", seconds(r.first - r.start))
    note(h, told, "time_to_first_token", true)
  end
  set(state, told, PROMPT_STATE, prompt)
  set(state, told, COMPLETION_STATE, completion)
  set(state, told, "llm.total_tokens", (r.known or not r.stream) and counts.total or prompt + completion)
  set(state, told, "llm.cached_tokens", cached)
  set(state, told, "llm.reasoning_tokens", reasoning)
  set(state, told, "llm.usage", r.reported and "reported" or "estimated")
  note(h, told, "special", not r.reported or (cached or 0) > 0 or (reasoning or 0) > 0)
  r.due = completion + math.floor(completion / 8) + 1
  return completion
end

local function read_piece(h, r, chunk, text)
  local out = nil
  if r.stream then
    if r.tail ~= "" or r.held ~= "" then text = r.tail .. r.held .. text end
    out = read_events(r, text)
    if not r.first and r.content > 0 then r.first = tonumber(microseconds(h)) end
  else
    read_json(r, r.tail ~= "" and r.tail .. text or text)
  end
  -- If the client or the provider breaks off, nothing is called any more: what was told until then stays.
  local completion = r.known and r.counts.completion or math.max(r.pieces, r.content * TOKENS_PER_BYTE)
  if completion >= r.due and (r.stream or r.base == 2) or r.reported and r.told["llm.usage"] ~= "reported" then
    local state = state_of(h, r)
    if state then tell(h, r, state) end
  end
  if out then chunk:setBytes(out) end
end

local function append(chunk, text)
  local size = chunk:length()
  chunk:setBytes((size > 0 and chunk:getBytes(0, size) or "") .. text)
end

local function read_response(h)
  local headers = h:headers()
  local encoding = (headers:get("content-encoding") or "identity"):lower()
  local content_type = (headers:get("content-type") or ""):lower()
  local inflater = new_inflater(encoding)
  local r = new_reader()
  r.stream = sub(content_type, 1, 17) == "text/event-stream"
  -- Plain JSON is read before it is known whose it is: filter state, which costs much, is needed at the end anyway.
  if encoding ~= "identity" or sub(content_type, 1, 16) ~= "application/json" then
    local state = state_of(h, r)
    if not state then return end
    local attempt = r.stream and state:get(ATTEMPT_STATE) or ""
    r.removing = (inflater or encoding == "identity") and sub(attempt, 1, 1) == ADDED
    r.start = tonumber(match(attempt, "%d+"))
  end
  if r.removing then headers:remove("content-length") end
  -- What nothing is taken out of stays compressed.
  local inflating = r.removing and inflater
  if inflating then headers:remove("content-encoding") end

  local last, fault = nil, nil
  for chunk in h:bodyChunks() do
    last = chunk
    if not inflater and encoding ~= "identity" or fault and not inflating then break end
    local size, held = chunk:length(), r.held
    if size > 0 then
      local text = chunk:getBytes(0, size)
      if inflater then text = inflate(inflater, text) end
      if inflating then chunk:setBytes(text) end
      if not fault and text ~= "" then
        local ok, err = pcall(read_piece, h, r, chunk, text)
        if not ok then
          if held ~= "" then chunk:setBytes(held .. text) end
          fault = err -- no more is read, and all passes
        end
      end
    end
  end
  if inflater and not inflater.step then
    h:logWarn("llm_provider: faulty " .. encoding .. ", or of more than " .. MAX_RATIO .. " times its length")
  end
  if fault then error(fault, 0) end
  if not last then return end

  local held = r.stream and finish_events(r) or ""
  -- Behind trailers the last piece is gone. What is lost then is half an event, which a client may not use.
  if held ~= "" then pcall(append, last, held) end
  if not next(r.counts) and sub(h:headers():get(":status"), 1, 1) ~= "2" then return end
  local state = state_of(h, r)
  if not state then return end
  r.known = r.known or r.counts.completion ~= nil
  r.reported = r.known or not r.stream
  local completion = tell(h, r, state)
  if not completion then
    set(state, r.told, "llm.usage", "unknown")
    note(h, r.told, "special", true)
  elseif completion > 1 and r.first then
    local time = (tonumber(microseconds(h)) - r.first) / (completion - 1)
    set(state, r.told, "llm.time_per_output_token", seconds(time))
    note(h, r.told, "time_per_output_token", true)
  end
end

-- Envoy lets a request pass unchanged when a script fails. Here it would pass with the provider's key.
function envoy_on_request(h)
  local ok, err = pcall(handle, h)
  if not ok then
    h:logErr("llm_provider: " .. tostring(err))
    refuse(h, "500", "internal_error", "The proxy could not prepare the request.")
  end
end

-- A response passes whatever happens.
function envoy_on_response(h)
  local ok, err = pcall(read_response, h)
  if not ok then h:logErr("llm_provider: " .. tostring(err)) end
end

-- Traces of these functions would not pay: they consist of calls into Envoy, which LuaJIT does not compile,
-- and it would make a new trace for each header name that it meets. The scanner is what is to be compiled.
local interpreted = {
  envoy_on_request, handle, operation_of, client_path, refuse, plan_of, label_of, microseconds,
  envoy_on_response, read_response, read_piece, state_of, tell, tokens, set, note, append,
}
for _, f in ipairs(interpreted) do jit.off(f, true) end
